"""The stages of dvc.yaml as Prefect tasks: their order, how each is retried, and thin wrappers around children.

The graph is written in dvc.yaml and nowhere else, and so is each stage's retry policy (`meta: {flow: ...}`). Prefect's
result caching is off everywhere: only DVC decides whether a stage is stale.
"""

import logging
from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field, ValidationError

from flows.process import CommandFailed, Outcome, Project
from vlv.config import ConfigError, Section
from vlv.io import files

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

HOUR = 3600.0
REFUSED = 3  # exit code of `vlv promote` where a gate failed


class RetryPolicy(Section):
    """How the flow runs one stage: `meta: {flow: ...}` of the stage in dvc.yaml.

    Attributes:
        retry_after: "signal": only after a signal ended the stage (out of memory, a stopped machine); "error": also
            after an error of its own, such as a network that failed.
        timeout_hours: ends a stage that hangs; not an estimate of how long it takes.
        tracked: whether the stage opens an MLflow run.
    """

    retries: int = Field(default=0, ge=0)
    retry_after: Literal["signal", "error"] = "signal"
    retry_delay_seconds: float = Field(default=10.0, ge=0)
    timeout_hours: float = Field(default=2.0, gt=0)
    tracked: bool = True


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


def retry_policy(root: Path, name: str) -> RetryPolicy:
    """How the flow runs a stage of `root`/dvc.yaml; the defaults where its `meta` says nothing.

    Raises:
        ConfigError: a `meta: {flow: ...}` that cannot be used.
    """
    path = root / "dvc.yaml"
    meta = _declared(path)[name].get("meta") or {}
    try:
        return RetryPolicy.model_validate(meta.get("flow") or {})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"{path}, stages.{name}.meta.flow: {wrong}") from error


def _declared(path: Path) -> dict[str, Any]:
    """The stages as dvc.yaml has them."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: this is not the project folder")
    return files.read_yaml_mapping(path).get("stages") or {}


def _needs(path: Path) -> dict[str, set[str]]:
    """Stage -> the stages whose outputs it reads."""
    declared = _declared(path)
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


def _say() -> Callable[[str], None]:
    logger = get_run_logger()

    def say(line: str) -> None:
        logger.log(logging.ERROR if line.startswith("ERROR") else logging.INFO, "%s", line)

    return say


@task(
    name="prepare",
    retries=2,
    retry_delay_seconds=[5, 30],
    timeout_seconds=6 * HOUR,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def prepare(project: Project) -> None:
    """Fetch the assets and make the data where there is none. The network can fail, so this is retried."""
    project.python("-m", "vlv", "data", "download", "--if-missing", say=_say())


@task(name="verify", timeout_seconds=6 * HOUR, persist_result=False, cache_policy=NO_CACHE)
def verify(project: Project) -> None:
    """Compare the data with its manifest and with data.dvc, because DVC itself accepts changed data. Writes nothing."""
    project.python("-m", "vlv", "data", "verify", say=_say())


@task(name="status", timeout_seconds=HOUR, persist_result=False, cache_policy=NO_CACHE)
def stale(project: Project) -> set[str]:
    """The stages that DVC finds changed."""
    return project.stale(_say())


def _retry(after: Literal["signal", "error"]) -> Callable[["Task[..., Any]", "TaskRun", "State[Any]"], bool]:
    def condition(_task: "Task[..., Any]", _run: "TaskRun", state: "State[Any]") -> bool:
        error = state.result(raise_on_failure=False)
        return isinstance(error, CommandFailed) and (error.by_signal or after == "error")

    return condition


@task(persist_result=False, cache_policy=NO_CACHE)
def _stage(project: Project, name: str, variables: Mapping[str, str]) -> Outcome:
    say = _say()
    outcome = project.reproduce(name, say, **variables)
    say(f"{name}: {outcome}")
    return outcome


def stage(
    name: str, policy: RetryPolicy, timeout_seconds: float | None = None
) -> "Task[[Project, str, Mapping[str, str]], Outcome]":
    """The task of one stage: of the project, the stage's name and the variables that its process gets."""
    return _stage.with_options(
        name=name,
        task_run_name=name,
        retries=policy.retries,
        retry_delay_seconds=policy.retry_delay_seconds,
        retry_condition_fn=_retry(policy.retry_after),
        timeout_seconds=timeout_seconds or policy.timeout_hours * HOUR,
    )


@task(
    name="promote",
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=_retry(after="error"),
    timeout_seconds=HOUR,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def promote(project: Project) -> tuple[bool, str]:
    """Run `vlv promote` for the new versions. Returns whether they are champions, and the command's output.

    A refusal is an answer, not a failure of the run.
    """
    lines: list[str] = []
    say = _say()

    def listen(line: str) -> None:
        lines.append(line)
        say(line)

    try:
        project.python("-m", "vlv", "promote", say=listen)
    except CommandFailed as error:
        if error.returncode != REFUSED:
            raise
        return False, "\n".join(lines)
    return True, "\n".join(lines)
