"""A run, as the stages see it."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vlv.config import Paths
from vlv.io.stopping import Stopped
from vlv.io.tables import flatten
from vlv.tracking import replay, run_record, store
from vlv.tracking.run_record import Begin, RunRecord

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARENT_VARIABLE = "VLV_PARENT_RUN_ID"
FLOW_VARIABLE = "VLV_FLOW_RUN_ID"
CLOSE_SECONDS = 15.0  # how long the end of a run waits for a server
LOCAL_CLOSE_SECONDS = 120.0  # and for the project's sqlite file, which is never dead, only slow on a full machine
INTERRUPTED_CLOSE_SECONDS = 4.0  # the seconds between SIGTERM and SIGKILL are the checkpoint's
_RESUME_SECONDS = 60.0  # how long a resumed run waits for a process that delivers its record
_KEY_LIMIT, _PARAM_LIMIT, _TAG_LIMIT, _DIGEST_LIMIT = 250, 6000, 8000, 36  # MLflow 3's


class Run:
    """What a stage can log. Every method but `wait_for_id` and `recall` writes to local disk only."""

    def __init__(self, record: RunRecord, replayer: replay.Replayer) -> None:
        self._record = record
        self._replayer = replayer

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has given one."""
        return self._record.run_id

    def wait_for_id(self, seconds: float | None = None) -> str | None:
        """The run's id, after waiting for it at most so long (by default 15 s for a server, 120 s for the sqlite file).

        VLV_PARENT_RUN_ID passes it to the runs of other processes that are to nest under this one.
        """
        self._replayer.made_run.wait(self._patience() if seconds is None else seconds)
        return self.run_id

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters. Nested mappings become dotted keys; values longer than MLflow takes are cut.

        A parameter that the run already has keeps its value, as MLflow demands.
        """
        flat = {clean_key(key): str(value)[:_PARAM_LIMIT] for key, value in flatten(values).items()}
        fresh = {key: value for key, value in flat.items() if key not in self._record.params}
        if fresh:
            self._record.append("params", values=fresh)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one point on each named curve. NaN and infinity are kept.

        A point is dropped where its curve has this step or a later one: a resumed training goes through its last
        steps again, and that must not double them.
        """
        self._record.add_metrics(step, {clean_key(key): value for key, value in values.items()})

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags, overwriting earlier ones of the same name."""
        self._record.append("tags", values=_clean_tags(values))

    def log_artifact(self, path: Path, to: str = "") -> None:
        """Log a file, or a folder with everything in it, as it is now; `to` is a folder in the run's artifacts.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        self._record.append("artifact", kept=self._record.attach(path), to=to)

    def log_dataset(
        self, name: str, digest: str, source: str, counts: Mapping[str, int], context: str = "training"
    ) -> None:
        """Log which data the run reads: its hash (MLflow keeps 36 characters; the profile has all of it)."""
        dataset = {
            "name": name[:500],
            "digest": digest[:_DIGEST_LIMIT],
            "source_type": "local",
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"digest": digest, **counts}),
        }
        self._record.append("dataset", dataset=dataset, context=context)

    def next_step(self, key: str) -> int:
        """The first step that a curve does not have yet."""
        return self._record.last_steps.get(clean_key(key), -1) + 1

    def curve(self, keys: Collection[str]) -> dict[int, dict[str, float]]:
        """The points recorded so far, step -> values, where all of `keys` were logged together."""
        return run_record.curve(run_record.read(self._record.folder / run_record.NAME), keys)

    def recall(self, keys: Collection[str]) -> dict[int, dict[str, float]]:
        """As `curve`, but from MLflow, for points that the record lost to a damaged disk.

        Empty if MLflow does not answer within 15 s (a server) or 120 s (the sqlite file).
        """
        begin, run_id = self._record.begin, self.wait_for_id()
        found: list[dict[int, dict[str, float]]] = []
        if begin is None or run_id is None:
            return {}

        def ask() -> None:
            try:
                found.append(replay.history(begin.uri, run_id, keys))
            except Exception as error:
                log.warning("MLflow does not return the curve: %s", error)

        thread = threading.Thread(target=ask, name="vlv-mlflow-history", daemon=True)
        thread.start()
        thread.join(self._patience())
        return found[0] if found else {}

    def _patience(self) -> float:
        local = self._record.begin is not None and self._record.begin.uri.startswith("sqlite:")
        return LOCAL_CLOSE_SECONDS if local else CLOSE_SECONDS

    def _end(self, status: Status) -> bool:
        """Record the end and deliver what is left, for a limited time. False: something is left in the record."""
        self._record.finish(status)
        if self._replayer.close(INTERRUPTED_CLOSE_SECONDS if status == "KILLED" else self._patience()):
            return True
        uri = self._record.begin.uri if self._record.begin else ""
        log.warning(
            "MLflow (%s) does not answer; the rest waits in %s. The next run delivers it, or: vlv doctor",
            store.without_password(uri), self._record.folder,
        )  # fmt: skip
        return False


@contextmanager
def start_run(
    paths: Paths,
    name: str,
    *,
    parent_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    folder: Path | None = None,
    system_metrics: bool = True,
    interval: float = replay.INTERVAL,
) -> Iterator[Run]:
    """Open a run for the `with` block: FINISHED at its end, KILLED where it was stopped, FAILED on an error.

    No call waits for a server, except the end: at most 15 s. What is left then is delivered by the next run on this
    project or by `vlv doctor`.

    Args:
        parent_id: the run to nest under; without: VLV_PARENT_RUN_ID.
        folder: a training's folder; the record lies beside its checkpoints. A run that was begun there continues, and
            no point is repeated. Call `keep_undelivered` before removing the folder. Without a folder the record lies
            in the outbox and is removed when it is delivered.

    Raises:
        LockHeldError: another process still writes the run that is to be resumed.
        TrackingError: the project's own sqlite file cannot be used.
    """
    uri = store.prepare(paths)
    flow = os.environ.get(FLOW_VARIABLE)
    begin = Begin(
        uri=uri,
        experiment=store.experiment_name(),
        artifacts=store.artifact_root(paths, uri),
        name=name,
        start_time=time.time_ns() // 1_000_000,
        parent_id=parent_id or os.environ.get(PARENT_VARIABLE) or None,
        tags=_clean_tags({**({"vlv.flow_run_id": flow} if flow else {}), **(tags or {})}),
    )
    record = RunRecord.create(store.outbox(paths), begin) if folder is None else _resumed(folder, begin)
    replayer = replay.Replayer(record, interval)
    run = Run(record, replayer)
    replayer.start()
    threading.Thread(target=_replay_others, args=(paths,), name="vlv-outbox", daemon=True).start()
    ended = threading.Event()
    if system_metrics:
        from vlv.tracking.system import sample

        threading.Thread(target=sample, args=(run, ended), name="vlv-system-metrics", daemon=True).start()
    status: Status = "FINISHED"
    try:
        yield run
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, Stopped)
        status = "FAILED" if failed else "KILLED"
        raise
    finally:
        ended.set()
        if run._end(status) and folder is None:
            record.remove()


def _resumed(folder: Path, begin: Begin) -> RunRecord:
    """The record of the run that was begun in a training's folder, or a new one."""
    for found in list(run_record.folders(folder))[-1:]:
        record = RunRecord.open(found, wait=_RESUME_SECONDS)
        # Damage took the line that says how to make the run, or another server is asked for: it gets all of it.
        if record.begin is None or record.begin.uri != begin.uri:
            record.begin_with(begin)
        record.append("resume")
        return record
    return RunRecord.create(folder, begin)


def _replay_others(paths: Paths) -> None:
    try:
        replay.replay_all(paths)
    except Exception as error:  # housekeeping must not spoil the run
        log.warning("What earlier runs left could not be delivered: %s", error)


def clean_key(name: str) -> str:
    """A key that MLflow takes: other characters become "_"."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_KEY_LIMIT]


def _clean_tags(values: Mapping[str, str]) -> dict[str, str]:
    return {clean_key(key): str(value)[:_TAG_LIMIT] for key, value in values.items()}
