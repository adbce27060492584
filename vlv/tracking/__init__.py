"""Experiment tracking with MLflow, which training never waits for.

What a run logs goes to a journal on disk first (vlv.tracking.journal); a thread ships it to MLflow
(vlv.tracking.delivery). A slow, dead or restarted server costs nothing but a warning: the journal stays in
the outbox and is shipped later, each point exactly once. By default MLflow is a sqlite file in the project.

    with tracking.start_run(paths, "stage1", resume_file=folder / "run.json") as run:
        run.log_params(config.stage1.model_dump())
        run.log_metrics({"loss": 0.5}, step=10)
"""

from vlv.tracking.outbox import FlushReport, flush_outbox, outbox_state
from vlv.tracking.parent import create_parent_run, finish_run
from vlv.tracking.run import Run, start_run
from vlv.tracking.store import TrackingError, prepare, tracking_uri

__all__ = [
    "FlushReport",
    "Run",
    "TrackingError",
    "create_parent_run",
    "finish_run",
    "flush_outbox",
    "outbox_state",
    "prepare",
    "start_run",
    "tracking_uri",
]
