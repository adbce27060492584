"""One function for each stage of the pipeline: where the parts meet.

The stages' dependencies and outputs are in dvc.yaml. Each reads params.yaml and what earlier stages
left, writes its outputs and returns its figures; each can be killed at any point and run again. A training stage
starts its own processes where compute.launch says so.
"""

import importlib
import os
import sys
from typing import Any

from vlv import config
from vlv.config import Paths
from vlv.io import files

NAMES = ["inputs", "validate", "stage1", "stage2", "evaluate", "register"]
_TRAININGS = {"stage1", "stage2"}


def run(stage: str, paths: Paths) -> dict[str, Any]:
    """Run one stage as params.yaml says.

    Raises:
        ValueError: no such stage. ConfigError, DataError, ModelFolderError, LockHeldError, Stopped and
        others: each says what to do.
    """
    if stage not in NAMES:
        raise ValueError(f"There is no stage {stage!r}; there are: {', '.join(NAMES)}")
    settings = config.load(paths)
    from vlv.training import launch

    launch_file = settings.compute.launch_of(stage) if stage in _TRAININGS else None
    if launch_file and not launch.inside():
        return _run_in_workers(stage, launch_file, paths)
    # Imported on demand: torch and its friends take seconds, and no stage needs all of them.
    with launch.reporting():
        module = importlib.import_module(f"vlv.stages.{stage}")
        result: dict[str, Any] = module.run(settings, paths)
    return result


def _run_in_workers(stage: str, launch_file: str, paths: Paths) -> dict[str, Any]:
    from vlv.training import launch

    launch.run([sys.executable, "-m", "vlv", "run", stage], paths.root / launch_file, paths.root, dict(os.environ))
    return files.read_json_object(paths.metrics / f"{stage}.json")
