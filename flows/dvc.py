"""The stages and their order, read from dvc.yaml: the graph is written there and nowhere else."""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

from vlv.config import ConfigError
from vlv.io import files


def stages(root: Path, upto: str | None = None) -> list[str]:
    """Names of the stages of `root`/dvc.yaml, each after all that it depends on.

    With `upto`, only that stage and what it depends on.

    Raises:
        ConfigError: no dvc.yaml, a form of it that is not read here, a cycle, or no stage called `upto`.
    """
    needs = _needs(root / "dvc.yaml")
    if upto is not None and upto not in needs:
        raise ConfigError(f"dvc.yaml has no stage {upto!r}; it has: {', '.join(needs)}")
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(f"dvc.yaml has a cycle: {' -> '.join(error.args[1])}") from error
    wanted = set(needs) if upto is None else _ancestors(upto, needs)
    written = list(needs)
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=written.index)  # dvc.yaml's own order where the graph is free
        order.extend(name for name in ready if name in wanted)
        sorter.done(*ready)
    return order


def _needs(path: Path) -> dict[str, set[str]]:
    """Stage -> the stages whose outputs it reads."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: this is not the project folder")
    declared: dict[str, Any] = files.read_yaml_mapping(path).get("stages") or {}
    for name, stage in declared.items():
        if "foreach" in stage or "matrix" in stage:
            raise ConfigError(f"{path}: stage {name!r} uses foreach or matrix, which the flow does not read")
    made = {
        name: [p for kind in ("outs", "metrics", "plots") for p in _paths(stage.get(kind))]
        for name, stage in declared.items()
    }
    return {
        name: {
            other
            for other, outs in made.items()
            if other != name and any(_overlap(dep, out) for dep in _paths(stage.get("deps")) for out in outs)
        }
        for name, stage in declared.items()
    }


def _paths(entries: list[str | dict[str, Any]] | None) -> list[PurePosixPath]:
    return [PurePosixPath(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries or []]


def _overlap(a: PurePosixPath, b: PurePosixPath) -> bool:
    return a == b or a in b.parents or b in a.parents


def _ancestors(name: str, needs: dict[str, set[str]]) -> set[str]:
    found = {name}
    for other in needs[name]:
        found |= _ancestors(other, needs)
    return found
