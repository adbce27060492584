"""From the record to MLflow, each entry once.

A replay can be cut anywhere (a kill, a lost answer) and repeated: a run is looked up by its record's name before it
is made, MLflow keeps one point for each (key, step, time, value) and the time is the recorded one, and every other
entry sets what it sets. So "at least once" on the wire is "exactly once" in MLflow. A record's lock keeps a second
process out.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlv.config import Paths
from vlv.io import files
from vlv.tracking import run_record, store
from vlv.tracking.run_record import Begin, RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RECORD_TAG = "vlv.record"
INTERVAL = 2.0  # seconds between replays of a live run
_LONGEST_PAUSE = 60.0  # seconds between attempts on a dead server
_METRICS_PER_BATCH = 1000  # MLflow's limit
_PARAMS_PER_BATCH = 100  # MLflow's limit
_PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"}

_Answer = TypeVar("_Answer")


class Unreachable(RuntimeError):
    """MLflow cannot be reached now; a later attempt may succeed."""


class _RunGone(Exception):
    """The server does not know the run."""


class _Refused(Exception):
    """MLflow will never take this entry."""


@dataclass(frozen=True)
class Replayed:
    """What `replay_all` did: runs delivered, records that still wait, and why the first of them does."""

    delivered: int
    waiting: list[Path]
    reason: str | None = None


def replay_all(paths: Paths) -> Replayed:
    """Deliver what runs left undelivered whose process is gone. A run that did not record its end is marked KILLED.

    Records of living runs are left alone. After the first failure the other records of the same server are not tried.
    """
    found, outbox = _records(paths), store.outbox(paths)
    if found:
        store.prepare(paths)
    delivered, waiting, reason = 0, [], None
    dead: set[str] = set()
    for record in _idle(found):
        if record.begin is None:
            # A training that continues records again how to make its run; nothing does that for the outbox.
            if record.folder.parent == outbox:
                path = record.folder / run_record.NAME
                files.set_aside(path, f"{path} does not say how to make its run.", "the run is not delivered")
        elif record.begin.uri in dead:
            waiting.append(record.folder)
        else:
            try:
                delivered += _replay_left(record, outbox)
            except Unreachable as error:
                dead.add(record.begin.uri)
                waiting.append(record.folder)
                reason = reason or str(error)
    return Replayed(delivered, waiting, reason)


def undelivered(paths: Paths) -> list[Path]:
    """Records that hold something undelivered and have no living writer. Contacts no server."""
    return [record.folder for record in _idle(_records(paths)) if record.waits()]


def keep_undelivered(paths: Paths, folder: Path) -> None:
    """Copy what MLflow has not been told to the outbox, before a training's folder is removed."""
    for record in _idle(run_record.folders(folder)):
        if record.waits() or record.refused:
            record.copy_to(store.outbox(paths))


def _records(paths: Paths) -> list[Path]:
    """Folders of all records: those in the outbox, and those beside the checkpoints of unfinished trainings."""
    return list(run_record.folders(store.outbox(paths), *paths.work.glob("*/training-*")))


def _idle(folders: Iterable[Path]) -> Iterator[RunRecord]:
    """Each record whose run has no living process, open while the caller looks at it."""
    for folder in folders:
        try:
            record = RunRecord.open(folder)
        except (files.LockHeldError, FileNotFoundError):
            continue
        except files.FileError as error:
            log.warning("%s", error)
            continue
        try:
            yield record
        finally:
            record.close()


def _replay_left(record: RunRecord, outbox: Path) -> int:
    """Deliver one record; 1 where there was something to deliver."""
    if not record.ended:
        record.finish("KILLED")
    new = record.waits()
    replay(record)
    if record.folder.parent == outbox:
        record.remove()
    if new:
        log.info("Delivered what run %s had left undelivered", record.run_id)
    return int(new)


def replay(record: RunRecord) -> None:
    """Tell MLflow everything that is pending.

    Raises:
        Unreachable: the server does not answer; what it confirmed is noted.
    """
    assert record.begin is not None
    try:
        _replay(record, record.begin)
    except _RunGone:
        log.warning("MLflow no longer knows run %s: making it again from %s", record.run_id, record.folder)
        record.begin_with(record.begin)
        try:
            _replay(record, record.begin)
        except _RunGone as error:
            raise Unreachable("MLflow does not know a run that it has just made") from error


def _replay(record: RunRecord, begin: Begin) -> None:
    client = store.client(begin.uri)
    run_id = record.run_id
    if run_id is None:
        run_id = _call(lambda: _find_or_make(client, begin, record.folder.name))
        if not record.told(run_id):
            return
    while entries := record.pending():
        # Points first, many at once; what is left keeps its order.
        _send(client, run_id, [one.entry for one in entries if one.entry["op"] == "metrics"], record)
        for one in entries:
            if one.entry["op"] != "metrics":
                _send(client, run_id, [one.entry], record)
        if not record.told(run_id, entries):
            return  # closed while entries were being sent


def _find_or_make(client: "MlflowClient", begin: Begin, name: str) -> str:
    experiment = store.experiment_id(client, begin.experiment, begin.artifacts)
    found = client.search_runs([experiment], filter_string=f"tags.`{RECORD_TAG}` = '{name}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {**begin.tags, RECORD_TAG: name}
    if begin.parent_id:
        tags["mlflow.parentRunId"] = begin.parent_id
    made = client.create_run(experiment, start_time=begin.start_time, tags=tags, run_name=begin.name)
    return str(made.info.run_id)


def _send(client: "MlflowClient", run_id: str, entries: list[dict[str, Any]], record: RunRecord) -> None:
    """Send points, or one entry of another kind; one that MLflow refuses for good is noted with its reason."""
    try:
        _call(lambda: _apply(client, run_id, entries, record.folder))
    except _Refused as error:
        if len(entries) > 1:  # find the one that is refused
            for one in entries:
                _send(client, run_id, [one], record)
        else:
            log.warning("MLflow refuses an entry of %s, which keeps it: %s", record.folder, error)
            record.append("refused", entry=entries[0], reason=str(error))


def _apply(client: "MlflowClient", run_id: str, entries: list[dict[str, Any]], folder: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    if not entries:
        return
    entry = entries[0]
    match entry["op"]:
        case "metrics":
            points = [
                Metric(key, float(value), one["time"], one["step"])
                for one in entries
                for key, value in one["values"].items()
            ]
            for start in range(0, len(points), _METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=points[start : start + _METRICS_PER_BATCH])
        case "params":
            params = [Param(key, value) for key, value in entry["values"].items()]
            for start in range(0, len(params), _PARAMS_PER_BATCH):
                client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH])
        case "tags":
            for key, value in entry["values"].items():
                client.set_tag(run_id, key, value)
        case "dataset":
            context = InputTag("mlflow.data.context", entry["context"])
            client.log_inputs(run_id, [DatasetInput(Dataset(**entry["dataset"]), [context])])
        case "artifact":
            kept = folder / entry["kept"]
            if kept.is_dir():
                client.log_artifacts(run_id, str(kept), f"{entry['to']}/{kept.name}".strip("/"))
            else:
                client.log_artifact(run_id, str(kept), entry["to"] or None)
        case "resume":
            client.update_run(run_id, status="RUNNING")
        case "finish":
            client.set_terminated(run_id, status=entry["status"], end_time=entry["time"])


def history(uri: str, run_id: str, keys: Collection[str]) -> dict[int, dict[str, float]]:
    """The points that MLflow has of all of `keys` together: step -> values. Raises `Unreachable`."""
    client = store.client(uri)
    found: dict[int, dict[str, float]] = {}
    for key in keys:
        for point in _call(lambda key=key: client.get_metric_history(run_id, key)):  # type: ignore[misc]
            found.setdefault(point.step, {})[key] = point.value
    return {step: values for step, values in found.items() if len(values) == len(keys)}


def _call(action: Callable[[], _Answer]) -> _Answer:
    """Run one conversation with MLflow; its failures become _RunGone, _Refused or Unreachable."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return action()
    except store.TrackingError as error:
        raise Unreachable(str(error)) from error
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise _RunGone from error
        kind = _Refused if error.error_code in _PERMANENT else Unreachable
        raise kind(store.without_password(str(error))) from error
    except requests.HTTPError as error:  # artifacts answer with plain HTTP
        refused = error.response is not None and 400 <= error.response.status_code < 500
        raise (_Refused if refused else Unreachable)(store.without_password(str(error))) from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _Refused(str(error)) from error
    except (OSError, SQLAlchemyError) as error:  # no connection; a locked sqlite file
        raise Unreachable(store.without_password(str(error))) from error


class Replayer(threading.Thread):
    """Replays a record in the background. A daemon: a hanging server never keeps the process alive."""

    def __init__(self, record: RunRecord, interval: float = INTERVAL) -> None:
        super().__init__(name="vlv-mlflow", daemon=True)
        self._record = record
        self._interval = interval
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self.made_run = threading.Event()  # set when MLflow has given the run its id
        self.complete = False  # everything was delivered before the thread ended

    def run(self) -> None:
        pause = self._interval
        while not self._given_up.is_set():
            closing = self._closing.is_set()  # read first: the last entries were recorded before it
            try:
                replay(self._record)
                pause = self._interval
                self.made_run.set()
                if closing:
                    self.complete = not self._given_up.is_set()
                    return
            except Exception as error:  # whatever is wrong with MLflow, the run continues
                if pause == self._interval:
                    log.warning("MLflow is not told; %s keeps it: %s", self._record.folder, _first_line(error))
                pause = min(_LONGEST_PAUSE, pause * 2)
            self._wake.wait(1.0 if self._closing.is_set() else pause)
            self._wake.clear()

    def close(self, seconds: float) -> bool:
        """Deliver what is left, for at most so many seconds, and close the record. False: something is left in it."""
        self._closing.set()
        self._wake.set()
        self.join(seconds)
        self._given_up.set()  # a thread that still hangs ends with its call
        self._record.close()
        return self.complete


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
