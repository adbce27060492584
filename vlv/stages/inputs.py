"""What decides each stage's result besides its data, written to files that DVC compares.

A stage of dvc.yaml depends on `work/inputs/STAGE.json`: hashes of the code that it reaches and of its pretrained parts,
and the settings that it reads with their defaults filled in. A change of these makes the stage stale; a change of
anything else, such as a comment, another stage or another kind of decoder, does not.
"""

import logging
from typing import Any

from vlv.config import Config, Paths
from vlv.io import files
from vlv.stages import lineage

log = logging.getLogger(__name__)


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Write `work/inputs/STAGE.json` for each stage, and say what has changed in it."""
    written: dict[str, Any] = {}
    for stage in lineage.SETTINGS:
        path = paths.work / "inputs" / f"{stage}.json"
        written[stage] = lineage.inputs(stage, settings, paths)
        before = files.read_json(path) if path.exists() else None
        if before != written[stage]:
            files.write_json(path, written[stage])
        if before is not None and (names := changed(before, written[stage])):
            log.info("%s: changed: %s", stage, ", ".join(names))
    return written


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Modules, settings and parts that differ between two contents of a stage's file."""
    differing = {
        name
        for group in now
        for name in {*before.get(group, {}), *now[group]}
        if before.get(group, {}).get(name) != now[group].get(name)
    }
    return sorted(differing)
