"""Experiment tracking with MLflow, which training never waits for.

What a run logs goes to its record on disk first (vlv.tracking.run_record); a thread replays the record to MLflow
(vlv.tracking.replay). A slow, dead or restarted server costs nothing but a warning: the record stays and is replayed
later, each point exactly once. By default MLflow is a sqlite file in the project.

    with tracking.start_run(paths, "stage1", folder=checkpoints) as run:
        run.log_params(config.stage1.model_dump())
        run.log_metrics({"loss": 0.5}, step=10)
"""

from vlv.tracking.replay import Replayed, keep_undelivered, replay_all, undelivered
from vlv.tracking.run import FLOW_VARIABLE, PARENT_VARIABLE, Run, start_run
from vlv.tracking.store import TrackingError, prepare, tracking_uri, without_password

__all__ = [
    "FLOW_VARIABLE",
    "PARENT_VARIABLE",
    "Replayed",
    "Run",
    "TrackingError",
    "keep_undelivered",
    "prepare",
    "replay_all",
    "start_run",
    "tracking_uri",
    "undelivered",
    "without_password",
]
