"""Versions of registered models: their aliases and figures, listing them, fetching their files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vlv import tracking
from vlv.config import Paths
from vlv.evaluation import metrics
from vlv.io import files
from vlv.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
FIGURES_TAG = "figures"


class RegistryError(RuntimeError):
    """The registry cannot do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Version:
    """One registered version, for people: `vlv models`."""

    name: str
    version: int
    aliases: list[str]
    created: str
    figures: str
    run_id: str | None
    tags: dict[str, str]


def fetch(paths: Paths, uri: str) -> Path:
    """The model folder of a version (`models:/NAME@champion`, `models:/NAME/3`) as a local folder.

    Raises:
        RegistryError: no such version, or MLflow does not answer.
    """
    import mlflow
    from mlflow.models import Model

    with explained(tracking.prepare(paths)):
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
        artifacts = Model.load(str(local)).flavors["python_function"]["artifacts"]
    return local / str(artifacts["model"]["path"])


def list_models(paths: Paths) -> list[Version]:
    """All versions of all registered models, newest first within each model."""
    uri = tracking.prepare(paths)
    with explained(uri):
        client = store.client(uri)
        found = []
        for model in client.search_registered_models(max_results=1000):
            by_version: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                by_version.setdefault(str(number), []).append(alias)
            for one in client.search_model_versions(f"name = '{model.name}'", max_results=1000):
                found.append(_row(one, sorted(by_version.get(str(one.version), []))))
    return sorted(found, key=lambda row: (row.name, -row.version))


def version_with_alias(client: "MlflowClient", name: str, alias: str) -> int | None:
    """The version that an alias points to; None where there is no such alias.

    It is read from the registered model, because MLflow 3.17 answers a direct question for a missing alias with
    INVALID_PARAMETER_VALUE, which is also its answer to a wrong argument.

    Raises:
        RegistryError: no model of that name.
    """
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RegistryError(f"No model {name!r} is registered. Register one with: vlv run register") from error
    return int(aliases[alias]) if alias in aliases else None


def figures_of(one: "ModelVersion") -> dict[str, float]:
    """A version's figures, dotted key -> number."""
    tagged = files.parse_json(one.tags.get(FIGURES_TAG, "{}"), f"the tag {FIGURES_TAG} of {one.name}")
    return {str(key): float(value) for key, value in tagged.items()}


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn MLflow's failures into RegistryError, with what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ConnectionError) as error:
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            message = f"MLflow at {uri}: {error}. List the registered versions with: vlv models"
        else:
            message = f"MLflow at {uri} failed: {error}. Check MLFLOW_TRACKING_URI and the server, and run it again."
        raise RegistryError(tracking.without_password(message)) from error


def _row(one: "ModelVersion", aliases: list[str]) -> Version:
    shown = metrics.summary(figures_of(one))
    created = datetime.fromtimestamp(one.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    tags = {key: value for key, value in one.tags.items() if key != FIGURES_TAG}
    return Version(one.name, int(one.version), aliases, created, shown, one.run_id, tags)
