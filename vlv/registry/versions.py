"""Versions of a registered model: making them, listing them, fetching their files."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv import files, tracking
from vlv.config import Paths
from vlv.tracking import store
from vlv.tracking.run import clean_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
FIGURES_TAG = "figures"
_PACKAGE = Path(__file__).parent.parent
# What serving needs beside the package's own code, which travels with the model.
_REQUIREMENTS = (
    "mlflow",
    "torch",
    "transformers",
    "diffusers",
    "safetensors",
    "tokenizers",
    "numpy",
    "pandas",
    "Pillow",
    "pydantic",
    "PyYAML",
    "filelock",
)


class RegistryError(RuntimeError):
    """The registry cannot do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Served:
    """How a model is served: a models-from-code script, its columns and its parameters with defaults."""

    script: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    params: dict[str, int | float]


CAPTIONER = Served(_PACKAGE / "serving" / "captioner_model.py", {"image": "string"}, {"caption": "string"}, params={})
AUTOENCODER = Served(
    _PACKAGE / "serving" / "autoencoder_model.py",
    {"image": "string"},
    {"image": "string"},
    params={"steps": 50, "guidance": 2.0, "seed": 42},
)


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


def register(
    paths: Paths,
    name: str,
    served: Served,
    *,
    model_folder: Path,
    example: Mapping[str, list[str]],
    evaluation: Path,
    tags: Mapping[str, str],
    run_id: str | None,
    code: Path | None = _PACKAGE,
) -> int:
    """Register a model folder as a new version with the alias `challenger`, and return the version.

    Args:
        model_folder: self-contained, in Hugging Face form; `artifacts["model"]` of the script.
        example: input columns of a few rows (images as base64); the promotion gate predicts on it.
        evaluation: metrics/evaluate.json; kept with the version, its numbers become its figures.
        tags: the version's lineage, see `lineage`.
        run_id: the run that made it.
        code: package that is stored with the version, so that later changes here do not change it.

    Raises:
        RegistryError: MLflow does not answer or refuses.
    """
    uri = tracking.prepare(paths)
    figures = numbers(files.read_json(evaluation))
    with explained(uri), tempfile.TemporaryDirectory() as scratch:
        if run_id is None:
            raise RegistryError("A version needs the MLflow run that made it, and MLflow gave none. Is it up?")
        client = store.client(uri)
        experiment = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment, name, source_run_id=run_id, tags=dict(tags))
        folder = Path(scratch) / "model"
        _save(folder, logged, served, model_folder, evaluation, example, code)
        client.log_model_artifacts(logged.model_id, str(folder))
        _link_to_run(client, run_id, logged.model_id, figures)
        _ensure_registered(client, name)
        made = client.create_model_version(
            name,
            f"models:/{logged.model_id}",
            run_id=run_id,
            tags={**tags, FIGURES_TAG: json.dumps(figures)},
            model_id=logged.model_id,
        )
        client.set_registered_model_alias(name, CHALLENGER, made.version)
    return int(made.version)


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
    """The version that an alias points to; None where the alias is missing.

    Read from the registered model: asking for a missing alias directly is INVALID_PARAMETER_VALUE in
    MLflow 3.17, which a wrong argument is as well.

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
    return {str(key): float(value) for key, value in json.loads(one.tags.get(FIGURES_TAG, "{}")).items()}


def numbers(value: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested JSON objects under dotted keys; lists, texts and booleans are left out."""
    found: dict[str, float] = {}
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            found.update(numbers(inner, f"{prefix}{key}."))
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found[f"{prefix}{key}"] = float(inner)
    return found


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """MLflow's failures as RegistryError, with what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ConnectionError) as error:
        shown = re.sub(r"//[^/@]*@", "//", uri)  # no password into messages
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RegistryError(f"MLflow at {shown}: {error}. See what there is with: vlv models") from error
        raise RegistryError(
            f"MLflow at {shown} failed: {error}. Check MLFLOW_TRACKING_URI and the server, and run it again."
        ) from error


def _save(
    folder: Path,
    logged: "LoggedModel",
    served: Served,
    model_folder: Path,
    evaluation: Path,
    example: Mapping[str, list[str]],
    code: Path | None,
) -> None:
    """Write the model as MLflow serves it.

    Saved and then shipped, not by `log_model`: that one runs the model in this process, only to warn, and
    puts it into the fluent API's active experiment, whose artifacts lie below the current folder.
    """
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    specs = [ParamSpec(k, "double" if isinstance(v, float) else "long", v) for k, v in served.params.items()]
    signature = ModelSignature(
        inputs=Schema([ColSpec(kind, column) for column, kind in served.inputs.items()]),
        outputs=Schema([ColSpec(kind, column) for column, kind in served.outputs.items()]),
        params=ParamSchema(specs) if specs else None,  # type: ignore[arg-type]  # None is documented
    )
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            run_id=logged.source_run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        ),
        python_model=str(served.script),
        artifacts={"model": str(model_folder), "evaluation": str(evaluation)},
        code_paths=[str(code)] if code else None,
        signature=signature,
        input_example=pd.DataFrame(dict(example)),
        pip_requirements=[f"{package}=={installed(package)}" for package in _REQUIREMENTS],
    )


def _link_to_run(client: "MlflowClient", run_id: str, model_id: str, figures: Mapping[str, float]) -> None:
    """Show the model among the run's outputs, and the figures on the model's page."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    now = int(datetime.now(UTC).timestamp() * 1000)
    metrics = [Metric(clean_key(k), v, now, 0, model_id=model_id, run_id=run_id) for k, v in figures.items()]
    for start in range(0, len(metrics), 1000):  # MLflow's limit
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def _ensure_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _row(one: "ModelVersion", aliases: list[str]) -> Version:
    figures = figures_of(one)
    shown = [
        f"{label} {figures[key]:.4g}"
        for key, label in (
            ("scenes.exact_match", "exact"),
            ("scenes.object_recall", "recall"),
            ("reconstruction.object_recall", "reconstruction recall"),
            ("reconstruction.fid", "FID"),
        )
        if key in figures
    ]
    created = datetime.fromtimestamp(one.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    tags = {key: value for key, value in one.tags.items() if key != FIGURES_TAG}
    return Version(one.name, int(one.version), aliases, created, ", ".join(shown), one.run_id, tags)
