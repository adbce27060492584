"""The flow's tasks: thin Prefect wrappers around children of the project.

Result caching is off everywhere: whether something is stale is DVC's question alone.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.project import CommandFailed, Outcome, Project
from vlv import tracking
from vlv.config import Paths

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

HOUR = 3600.0
REFUSED = 3  # exit code of `vlv promote` where a gate failed


@dataclass(frozen=True)
class Care:
    """How a stage is looked after. A limit is there to end what hangs, not to plan with."""

    retries: int = 0
    delay_seconds: float = 10.0
    timeout_seconds: float = 24 * HOUR
    only_after_signal: bool = True  # False: also after an error of its own, such as a network that failed
    recorded: bool = True  # whether the stage opens an MLflow run


# A training that a signal ended (out of memory, a stopped machine) goes on from its checkpoint, so once more
# is cheap. Evaluation and registration reach for assets and a server. Other stages get DEFAULT_CARE.
CARE = {
    "inputs": Care(timeout_seconds=HOUR, recorded=False),
    "stage1": Care(retries=1, timeout_seconds=14 * 24 * HOUR),
    "stage2": Care(retries=1, timeout_seconds=14 * 24 * HOUR),
    "evaluate": Care(retries=1, delay_seconds=30, only_after_signal=False),
    "register": Care(retries=2, delay_seconds=15, timeout_seconds=HOUR, only_after_signal=False),
}
DEFAULT_CARE = Care(timeout_seconds=2 * HOUR)


class ParentRun:
    """The MLflow run that the stages' runs nest under; made when the first stage really has to run."""

    def __init__(self, paths: Paths, name: str, flow_run_id: str) -> None:
        self._paths, self._name, self._flow_run_id = paths, name, flow_run_id
        self._id: str | None = None
        self._opened = False

    def marks(self) -> dict[str, str]:
        """The variables that tie a child's records to this run; opens it."""
        if not self._opened:
            self._opened = True
            tags = {"vlv.flow_run_id": self._flow_run_id}
            self._id = tracking.create_parent_run(self._paths, self._name, tags)
        marks = {"VLV_FLOW_RUN_ID": self._flow_run_id}
        return marks | ({"VLV_PARENT_RUN_ID": self._id} if self._id else {})

    def close(self, status: Any, metrics: dict[str, float] | None = None) -> None:
        if self._id:
            tracking.finish_run(self._paths, self._id, status, metrics=metrics)


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
    """Fetch the assets and make the data where there is none (the network can fail: retried)."""
    project.python("-m", "vlv", "data", "download", "--if-missing", say=_say())


@task(name="verify", timeout_seconds=6 * HOUR, persist_result=False, cache_policy=NO_CACHE)
def verify(project: Project) -> None:
    """Compare the data with its manifest and with data.dvc, read-only: DVC itself would take changed data."""
    project.python("-m", "vlv", "data", "verify", say=_say())


@task(name="status", timeout_seconds=HOUR, persist_result=False, cache_policy=NO_CACHE)
def stale(project: Project) -> set[str]:
    """The stages that DVC finds changed."""
    return project.stale(_say())


def _retry(after_signal_only: bool) -> Callable[["Task[..., Any]", "TaskRun", "State[Any]"], bool]:
    def condition(_task: "Task[..., Any]", _run: "TaskRun", state: "State[Any]") -> bool:
        error = state.result(raise_on_failure=False)
        if not isinstance(error, CommandFailed):
            return False
        return error.by_signal or not after_signal_only

    return condition


@task(persist_result=False, cache_policy=NO_CACHE)
def _stage(project: Project, name: str, run: ParentRun) -> Outcome:
    say = _say()
    marks = run.marks() if CARE.get(name, DEFAULT_CARE).recorded else {}
    outcome = project.reproduce(name, say, **marks)
    say(f"{name}: {outcome}")
    return outcome


def stage(name: str, timeout_seconds: float | None = None) -> "Task[[Project, str, ParentRun], Outcome]":
    """The task of one stage of dvc.yaml, with the stage's own retries and time limit."""
    care = CARE.get(name, DEFAULT_CARE)
    return _stage.with_options(
        name=name,
        task_run_name=name,
        retries=care.retries,
        retry_delay_seconds=care.delay_seconds,
        retry_condition_fn=_retry(care.only_after_signal),
        timeout_seconds=timeout_seconds or care.timeout_seconds,
    )


@task(
    name="promote",
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=_retry(after_signal_only=False),
    timeout_seconds=HOUR,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def promote(project: Project) -> tuple[bool, str]:
    """Ask for the new versions to become champions: whether they are, and what was said.

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
