"""One function for each stage of the pipeline: where the parts meet.

The stages' order, dependencies and outputs are in dvc.yaml. Each reads params.yaml and what earlier stages
left, writes its outputs and returns its figures; each can be killed at any point and run again.
"""

import importlib
from typing import Any

from vlv import config
from vlv.config import Paths

NAMES = ["validate", "stage1", "stage2", "evaluate", "register"]


def run(stage: str, paths: Paths) -> dict[str, Any]:
    """Run one stage as params.yaml says.

    Raises:
        ValueError: no such stage. ConfigError, DataError, ModelFolderError, LockHeldError, Stopped and
        others: each says what to do.
    """
    if stage not in NAMES:
        raise ValueError(f"There is no stage {stage!r}; there are: {', '.join(NAMES)}")
    settings = config.load(paths)
    # Imported on demand: torch and its friends take seconds, and no stage needs all of them.
    module = importlib.import_module(f"vlv.stages.{stage}")
    result: dict[str, Any] = module.run(settings, paths)
    return result
