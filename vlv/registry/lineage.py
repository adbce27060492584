"""Where a model comes from, as tags: code, data, graph, parameters, evaluation set, flow."""

import os
import subprocess
from pathlib import Path

from vlv.config import Paths
from vlv.io import files, pin

UNKNOWN = "unknown"

# What the pipeline itself writes while it runs. All else that git sees is code or configuration.
OUTPUTS = ("dvc.lock", "data.dvc", "metrics", "plots")


def lineage(paths: Paths) -> dict[str, str]:
    """The tags that a registered version carries.

    `git_dirty` is "true" where a tracked file differs from the commit, or an untracked one lies beside them,
    params.yaml and configs/ included: code and configuration decide what the model is. Not counted are
    dvc.lock, data.dvc, metrics/ and plots/: the run that makes the model writes them, and their content
    has tags of its own. Whatever cannot be read (no git, no repository, no such file) is "unknown".
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
