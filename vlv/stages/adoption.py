"""Continuing a training that other code began.

After a change of code that influences a number, a stage starts again, so that one version of the code produces its
result. If that would cost days and the change is known to be harmless, an unfinished training can be adopted; the
difference is then written into the stage's figures.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from vlv import config, tracking
from vlv.config import ConfigError, Paths
from vlv.io import files
from vlv.stages import inputs
from vlv.stages.inputs import TrainingHashes
from vlv.training import state

log = logging.getLogger(__name__)

_FILE = "hashes.json"


def begin(training: Path, hashes: TrainingHashes) -> list[dict[str, Any]]:
    """Write what decides a training into its folder; returns its adoptions, oldest first.

    A warning names another unfinished training that differs only in its code.
    """
    path = training / _FILE
    if path.exists():
        adopted: list[dict[str, Any]] = files.read_json(path)["adopted"]
        return adopted
    for old, step in _others(training, hashes):
        log.warning(
            "%s stopped at step %d and was begun by other code. To go on from it: vlv run %s --adopt",
            old, step, training.parent.name,
        )  # fmt: skip
    files.write_json(path, {"code": hashes.code, "rest": hashes.rest, "adopted": []})
    return []


def adopt(stage: str, paths: Paths) -> Path:
    """Let the present code continue the most advanced unfinished training of a stage; returns its folder.

    Raises:
        ConfigError: no unfinished training has these settings, parts and data, or the present code has begun one.
    """
    hashes = inputs.training_hashes(stage, config.load(paths), paths)
    target = paths.work / stage / f"training-{hashes.input_hash[:12]}"
    if state.newest(target / "checkpoints"):
        raise ConfigError(f"{target} is a training by the present code already: it goes on by itself")
    others = sorted(_others(target, hashes), key=lambda other: other[1])
    if not others:
        raise ConfigError(
            f"{target.parent} has no unfinished training with these settings, pretrained parts and data. "
            f"Begin one with: dvc repro {stage}"
        )
    old, step = others[-1]
    with files.folder_lock(old, "adoption"):
        before: dict[str, Any] = files.read_json(old / _FILE)
        names = {*before["code"], *hashes.code}
        changed = sorted(name for name in names if before["code"].get(name) != hashes.code.get(name))
        adopted = [*before["adopted"], {"step": step, "changed": changed}]
        files.write_json(old / _FILE, {"code": hashes.code, "rest": hashes.rest, "adopted": adopted})
    with files.folder_lock(target, "adoption"):
        tracking.keep_undelivered(paths, target)
        shutil.rmtree(target)  # it has no checkpoint yet
    old.replace(target)
    return target


def _others(training: Path, hashes: TrainingHashes) -> list[tuple[Path, int]]:
    """Unfinished trainings beside `training` with the same settings, parts and data, and their steps."""
    found = []
    for folder in training.parent.glob("training-*"):
        path = folder / _FILE
        if folder != training and path.exists() and files.read_json(path)["rest"] == hashes.rest:
            step = state.newest(folder / "checkpoints")
            found += [(folder, step)] if step else []
    return found
