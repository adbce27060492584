"""Where MLflow keeps its records: a sqlite file in the project, or what MLFLOW_TRACKING_URI names."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from vlv.config import Paths
from vlv.io import files, telemetry

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "vlv"

# MLflow's own defaults keep one call on a dead server waiting for 247 s. A user's setting wins.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds, connect and read
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


class TrackingError(RuntimeError):
    """The tracking store cannot be used; the message says what to do."""


def store_folder(paths: Paths) -> Path:
    """Folder of the default store and of the outbox; ignored by git."""
    return paths.root / "mlflow" / "store"


def outbox(paths: Paths) -> Path:
    """The folder of records that belong to no training. Not in the cache: an undelivered record is the only copy."""
    return store_folder(paths) / "outbox"


def without_password(text: str) -> str:
    """The text with user and password in URLs replaced by "...", for logs, errors and the screen."""
    return re.sub(r"//[^/\s]*@", "//...@", text)


def tracking_uri(paths: Paths) -> str:
    """MLFLOW_TRACKING_URI, or the project's own sqlite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store_folder(paths).resolve() / 'mlflow.db'}"


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME, or "vlv"."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def prepare(paths: Paths) -> str:
    """Make the store usable by this process and return its URI. Contacts no server.

    MLflow breaks a new sqlite file when several processes open it first, so its tables are made under a lock,
    once for each MLflow version.

    Raises:
        TrackingError: the sqlite file cannot be made or brought to this MLflow's schema.
    """
    telemetry.off()
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(paths)
    if uri.startswith("sqlite:///"):
        _make_tables(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return uri


def _make_tables(uri: str) -> None:
    database = Path(uri.removeprefix("sqlite:///"))
    done = database.with_name(f".{database.name}.{version('mlflow')}")
    if done.exists() and database.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(database.with_name(f".{database.name}.lock"), timeout=300):
        if done.exists() and database.exists():
            return  # another process was first
        if database.exists():
            _upgrade(uri, database)
        else:
            client(uri).search_experiments(max_results=1)  # the first question makes the tables
        files.write_text(done, "")


def _upgrade(uri: str, database: Path) -> None:
    """Bring a sqlite file that an older MLflow wrote, or whose creation was interrupted, to this one's schema."""
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    # Not in the project folder, whose mlflow/ is not a package.
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=database.parent)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrackingError(
            f"MLflow cannot use {database}: {reason}. If a newer MLflow wrote it, install that version; "
            "otherwise move the file away and run the command again."
        )


def client(uri: str) -> "MlflowClient":
    """A client for tracking and registry."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(mlflow_client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The id of an experiment, made where there is none; `artifacts` is where a new one keeps them."""
    from mlflow.exceptions import MlflowException

    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow_client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = mlflow_client.get_experiment_by_name(name)  # another process was first
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"The MLflow experiment {name!r} was deleted. Restore it (mlflow experiments restore), "
            "or set MLFLOW_EXPERIMENT_NAME to another name."
        )
    return str(found.experiment_id)


def artifact_root(paths: Paths, uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside the sqlite file; a server decides for itself."""
    return (store_folder(paths).resolve() / "artifacts").as_uri() if uri.startswith("sqlite:///") else None
