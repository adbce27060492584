"""The flow `vlv`: data, gate, Stage 1, Stage 2, evaluation, registration, promotion.

    python -m flows.full_train                     # no infrastructure: a temporary Prefect server
    python -m flows.full_train --profile smoke     # write that profile into params.yaml first
    python -m flows.full_train --upto stage1
    python -m flows.full_train --make-pool         # on a server: the work pool of the deployments in prefect.yaml

With PREFECT_API_URL set it uses that server. With a worker: prefect.yaml, deployment vlv/full-train.
"""

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from rich.console import Console

from flows import artifacts, dvc
from flows.process import CommandFailed, Outcome, Project
from vlv import config, tracking
from vlv.config import ConfigError, Paths
from vlv.io import files
from vlv.io.files import LockHeldError

NOT_PROMOTED = 3  # exit code: everything ran, the new version is not the champion
POOL = "vlv"


@dataclass
class Summary:
    """What a run of the flow did."""

    seconds: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    promoted: bool | None = None  # None: not asked for
    promotion: str = ""


@flow(name="vlv", persist_result=False, log_prints=False)
def full_train(
    profile: str | None = None, upto: str | None = None, timeouts: dict[str, float] | None = None
) -> Summary:
    """Run the whole pipeline: only what is stale, each stage as a task of its own.

    Args:
        profile: configs/PROFILE.yaml is written into params.yaml first. Without it params.yaml stays as it is.
        upto: the last stage to run. Without it all stages run, and then the promotion.
        timeouts: time limits of stages in seconds, by name, instead of those in dvc.yaml.
    """
    paths = Paths.find()
    with files.folder_lock(paths.work, "the flow vlv"):
        chosen = config.use(paths, profile) if profile else config.load(paths)
        return _run(paths, chosen, upto, timeouts or {})


class _ParentRun:
    """The MLflow run that the stages' runs nest under. It is opened when the first stage that has a run is started."""

    def __init__(self, paths: Paths, until: ExitStack) -> None:
        self._paths, self._until = paths, until
        self._run: tracking.Run | None = None

    def variables(self) -> dict[str, str]:
        """The environment variables that tie a stage's MLflow run to the flow.

        The parent's id is missing if MLflow does not answer within 15 s: the stages' runs then stand alone.
        """
        flow_run_id = str(flow_run.id)
        first = self._run is None
        if self._run is None:
            opened = tracking.start_run(
                self._paths, f"{flow_run.name}", tags={"vlv.flow_run_id": flow_run_id}, system_metrics=False
            )
            self._run = self._until.enter_context(opened)
        parent_id = self._run.wait_for_id(None if first else 0)
        variables = {tracking.FLOW_VARIABLE: flow_run_id}
        return variables | ({tracking.PARENT_VARIABLE: parent_id} if parent_id else {})

    def log_figures(self) -> None:
        if self._run:
            self._run.log_metrics(artifacts.headline(self._paths))


def _run(paths: Paths, chosen: config.Config, upto: str | None, timeouts: dict[str, float]) -> Summary:
    start, logger = time.monotonic(), get_run_logger()
    project, summary = Project(paths.root), Summary()
    stages = dvc.stages(paths.root, upto)
    policies = {name: dvc.retry_policy(paths.root, name) for name in stages}
    logger.info("Profile %s in %s: %s", chosen.profile, paths.root, " -> ".join(stages))
    dvc.prepare(project)
    dvc.verify(project)
    changed = dvc.stale(project)
    with ExitStack() as until:
        parent = _ParentRun(paths, until)
        for name in stages:
            # A stage that was current at the start is still current if nothing ran before it.
            if name in changed or set(summary.outcomes.values()) - {"current"}:
                variables = parent.variables() if policies[name].tracked else {}
                task = dvc.stage(name, policies[name], timeouts.get(name))
                summary.outcomes[name] = task(project, name, variables)
            else:
                logger.info("%s: current", name)
                summary.outcomes[name] = "current"
        if upto is None and chosen.register_.promote:
            summary.promoted, summary.promotion = dvc.promote(project)
        parent.log_figures()
    artifacts.publish(paths, summary.outcomes, summary.promotion)
    summary.seconds = time.monotonic() - start
    return summary


def make_pool() -> None:
    """Make the work pool of the deployments in prefect.yaml, or leave it as it is.

    `prefect work-pool create` does the same, but has the server ask GitHub for a list of all kinds of pools first.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            print(f"The work pool {POOL!r} exists already.")
        else:
            print(f"Made the work pool {POOL!r}. Start a worker with: prefect worker start --pool {POOL}")


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # an ordinary exit, so that the temporary server is stopped too


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and show what came out. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.full_train", description=full_train.description)
    parser.add_argument("--profile", help="configs/PROFILE.yaml to write into params.yaml first")
    parser.add_argument("--upto", metavar="STAGE", help="last stage to run (and no promotion)")
    parser.add_argument("--make-pool", action="store_true", help="make the server's work pool; run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.make_pool:
        make_pool()
        return 0
    signal.signal(signal.SIGTERM, _terminated)
    console, errors = Console(), Console(stderr=True)
    try:
        summary = full_train(profile=chosen.profile, upto=chosen.upto)
    except (ConfigError, LockHeldError) as error:
        errors.print(f"[bold red]Error:[/] {error}", markup=True, highlight=False)
        return 2
    except CommandFailed as error:
        errors.print("[bold red]The run stopped.[/]")
        errors.print(str(error), markup=False, highlight=False)
        errors.print("Finished stages are kept. The same command continues from there.")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped. The same command continues from the last checkpoint.")
        return 130
    artifacts.show(console, Paths.find(), summary.outcomes, summary.seconds, summary.promotion)
    return NOT_PROMOTED if summary.promoted is False else 0


if __name__ == "__main__":
    sys.exit(main())
