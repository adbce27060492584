"""Registration: a model folder becomes a version that MLflow can serve, with tags that say what it was made from."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from vlv import tracking
from vlv.config import Paths
from vlv.io import files, pin
from vlv.io.tables import numbers
from vlv.registry.versions import CHALLENGER, FIGURES_TAG, RegistryError, explained
from vlv.tracking import store
from vlv.tracking.run import clean_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_PACKAGE = Path(__file__).parent.parent
_SCRIPT = Path(__file__).with_name("serving.py")
# What serving needs besides the package's own code, which is stored with the version.
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

UNKNOWN = "unknown"

# What the pipeline itself writes while it runs. Everything else that git sees is code or configuration.
OUTPUTS = ("dvc.lock", "data.dvc", "metrics", "plots")


@dataclass(frozen=True)
class Served:
    """How a model is served: its kind in vlv/registry/serving.py, its columns and its parameters with defaults."""

    kind: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    params: dict[str, int | float]
    script: Path = _SCRIPT


CAPTIONER = Served("captioner", {"image": "string"}, {"caption": "string"}, params={})
AUTOENCODER = Served(
    "autoencoder", {"image": "string"}, {"image": "string"}, params={"steps": 50, "guidance": 2.0, "seed": 42}
)


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
        model_folder: self-contained, in Hugging Face form; `artifacts["model"]` of vlv/registry/serving.py.
        example: input columns of a few rows (images as base64); the promotion gate predicts on it.
        evaluation: metrics/evaluate.json; kept with the version, its numbers become its figures.
        tags: the version's lineage, see `lineage`.
        run_id: the run that made it.
        code: the package that is stored with the version, so that later changes here do not change the version.

    Raises:
        RegistryError: MLflow does not answer or refuses.
    """
    uri = tracking.prepare(paths)
    figures = numbers(files.read_json_object(evaluation))
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

    It is saved and then uploaded. `log_model` would run the model in this process, only to warn, and would put it into
    the fluent API's active experiment, whose artifacts lie below the current folder.
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
        model_config={"kind": served.kind},
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


def lineage(paths: Paths) -> dict[str, str]:
    """The tags that a registered version carries.

    `git_dirty` is "true" if a tracked file differs from the commit or there is an untracked file. params.yaml and
    configs/ count, because code and configuration decide what the model is. dvc.lock, data.dvc, metrics/ and plots/ do
    not count: the run that makes the model writes them, and tags of their own describe them. What cannot be read (no
    git, no repository, no such file) is "unknown".
    """
    verdict = _json(paths.metrics / "validate.json").get("success")
    return {
        "git_commit": _git(paths.root, "rev-parse", "HEAD") or UNKNOWN,
        "git_dirty": _dirty(paths.root),
        "data_md5": _data_md5(paths.root / pin.POINTER),
        "dvc_lock_sha256": _sha256(paths.root / "dvc.lock"),
        "params_sha256": _sha256(paths.params),
        "profile": str(_yaml(paths.params).get("profile", UNKNOWN)),
        "data_validation": UNKNOWN if verdict is None else "passed" if verdict is True else "failed",
        "evaluation_set": str(_json(paths.metrics / "evaluate.json").get("evaluation_set", UNKNOWN)),
        "not_better_than_shuffled": _unlearned(_json(paths.metrics / "evaluate.json")),
        "flow_run_id": os.environ.get("VLV_FLOW_RUN_ID", UNKNOWN),
        "parent_run_id": os.environ.get("VLV_PARENT_RUN_ID", UNKNOWN),
    }


def _unlearned(evaluation: dict[str, object]) -> str:
    """The figures that are not clearly better than the shuffled control's, or "none"."""
    found = evaluation.get("not_better_than_shuffled")
    return UNKNOWN if not isinstance(found, dict) else ", ".join(found) or "none"


def _dirty(root: Path) -> str:
    if _git(root, "rev-parse", "HEAD") is None:
        return UNKNOWN
    excluded = [f":(exclude){name}" for name in OUTPUTS]
    changed = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", ".", *excluded)
    return UNKNOWN if changed is None else str(bool(changed)).lower()


def _git(root: Path, *arguments: str) -> str | None:
    """The output of git in the project, or None where it fails."""
    # A hook's variables would point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _sha256(path: Path) -> str:
    return files.sha256_file(path) if path.is_file() else UNKNOWN


def _data_md5(pointer: Path) -> str:
    try:
        return pin.pinned_md5(pointer)
    except files.FileError:
        return UNKNOWN


def _yaml(path: Path) -> dict[str, object]:
    return files.read_yaml_mapping(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, object]:
    return files.read_json_object(path) if path.is_file() else {}
