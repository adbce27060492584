"""The flow `vlv`: data, gate, Stage 1, Stage 2, evaluation, registration, promotion.

    python -m flows.full_train                     # no infrastructure: a temporary Prefect server
    python -m flows.full_train --profile smoke     # write that profile into params.yaml first
    python -m flows.full_train --upto stage1

A server of your own wins: set PREFECT_API_URL. With a worker: prefect.yaml, deployment vlv/full-train.
"""

import argparse
import signal
import sys
import time
from dataclasses import dataclass, field
from types import FrameType

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from rich.console import Console

from flows import artifacts, report, tasks
from flows import dvc as graph
from flows.project import CommandFailed, Outcome, Project
from vlv import config
from vlv.config import ConfigError, Paths
from vlv.io import files
from vlv.io.files import LockHeldError

NOT_PROMOTED = 3  # exit code: everything ran, the new version is not the champion


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
        profile: configs/PROFILE.yaml is written into params.yaml first; without: params.yaml as it is.
        upto: the last stage to run; without: all of them, then promotion.
        timeouts: time limits for stages by name, seconds, instead of the defaults (flows/tasks.py).
    """
    paths = Paths.find()
    with files.folder_lock(paths.work, "the flow vlv"):
        chosen = config.use(paths, profile) if profile else config.load(paths)
        return _run(paths, chosen, upto, timeouts or {})


def _run(paths: Paths, chosen: config.Config, upto: str | None, timeouts: dict[str, float]) -> Summary:
    start, logger = time.monotonic(), get_run_logger()
    project, summary = Project(paths.root), Summary()
    stages = graph.stages(paths.root, upto)
    logger.info("Profile %s in %s: %s", chosen.profile, paths.root, " -> ".join(stages))
    tasks.prepare(project)
    tasks.verify(project)
    changed = tasks.stale(project)
    run = tasks.ParentRun(paths, f"{flow_run.name}", str(flow_run.id))
    status = "FAILED"
    try:
        for name in stages:
            # Current at the start and nothing ran before it: DVC need not be asked again.
            if name in changed or set(summary.outcomes.values()) - {"current"}:
                summary.outcomes[name] = tasks.stage(name, timeouts.get(name))(project, name, run)
            else:
                logger.info("%s: current", name)
                summary.outcomes[name] = "current"
        if upto is None and chosen.register_.promote:
            summary.promoted, summary.promotion = tasks.promote(project)
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:  # Ctrl-C, a cancel
        status = "KILLED"
        raise
    finally:
        run.close(status, report.headline(paths) if status == "FINISHED" else None)
    artifacts.publish(paths, summary.outcomes, summary.promotion)
    summary.seconds = time.monotonic() - start
    return summary


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # an ordinary exit, so that the temporary server is stopped too


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and show what came out. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.full_train", description=full_train.description)
    parser.add_argument("--profile", help="configs/PROFILE.yaml to write into params.yaml first")
    parser.add_argument("--upto", metavar="STAGE", help="last stage to run (and no promotion)")
    chosen = parser.parse_args(arguments)
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
        errors.print("What was finished is kept: the same command goes on from there.")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on from the last checkpoint.")
        return 130
    report.show(console, Paths.find(), summary.outcomes, summary.seconds, summary.promotion)
    return NOT_PROMOTED if summary.promoted is False else 0


if __name__ == "__main__":
    sys.exit(main())
