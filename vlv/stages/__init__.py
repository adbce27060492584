"""The stages of the pipeline, one function each.

The stages' dependencies and outputs are in dvc.yaml. Each stage reads params.yaml and the outputs of earlier stages,
writes its outputs and returns its figures. It can be killed at any point and run again. A training stage starts its
own processes if compute.launch says so.
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
    """Run one stage with the settings of params.yaml.

    Raises:
        ValueError: no such stage. ConfigError, DataError, ModelFolderError, LockHeldError, Stopped and
        others: the message names the remedy.
    """
    if stage not in NAMES:
        raise ValueError(f"There is no stage {stage!r}; there are: {', '.join(NAMES)}")
    settings = config.load(paths)
    from vlv.training import launch

    launch_file = settings.compute.launch_of(stage) if stage in _TRAININGS else None
    if launch_file and not launch.inside():
        return _run_in_workers(stage, launch_file, paths)
    # Imported on demand: torch and similar libraries take seconds, and no stage needs all of them.
    with launch.reporting():
        module = importlib.import_module(f"vlv.stages.{stage}")
        result: dict[str, Any] = module.run(settings, paths)
    return result


def _run_in_workers(stage: str, launch_file: str, paths: Paths) -> dict[str, Any]:
    from vlv.training import launch

    launch.run([sys.executable, "-m", "vlv", "run", stage], paths.root / launch_file, paths.root, dict(os.environ))
    return files.read_json_object(paths.metrics / f"{stage}.json")
