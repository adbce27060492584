"""From the journal to MLflow, each entry once.

Delivery can be cut anywhere (a kill, a lost answer) and repeated: a run is looked up by its journal's name
before it is made, MLflow's metric points are unique by (key, step, time, value), and all other entries set
what they set. So "at least once" on the wire is "exactly once" in the records.
"""

import logging
import threading
from typing import TYPE_CHECKING, Any

from vlv.tracking import store
from vlv.tracking.journal import Head, Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

JOURNAL_TAG = "vlv.journal"
INTERVAL = 2.0  # seconds between deliveries
_LONGEST_PAUSE = 60.0  # seconds between attempts on a dead server
_METRICS_PER_BATCH = 1000  # MLflow's limit
_PARAMS_PER_BATCH = 100  # MLflow's limit
_PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"}


class Unreachable(RuntimeError):
    """MLflow could not be told now; later may do."""


class _RunGone(Exception):
    """The server does not know the run."""


def deliver(journal: Journal) -> None:
    """Tell MLflow everything that is pending.

    Raises:
        Unreachable: the server does not answer; what it confirmed is recorded.
    """
    try:
        _deliver(journal)
    except _RunGone:
        if journal.head.run_id is not None:  # not ours to make again
            _reject_rest(journal, "the run does not exist")
            return
        log.warning("MLflow no longer knows run %s: making it again from %s", journal.run_id, journal.folder)
        journal.start_over()
        try:
            _deliver(journal)
        except _RunGone as error:
            raise Unreachable("MLflow does not know a run that it has just made") from error


def _deliver(journal: Journal) -> None:
    client = store.client(journal.head.uri)
    run_id = journal.run_id
    if run_id is None:
        run_id = _call(lambda: _find_or_make(client, journal.head, journal.folder.name))
        journal.delivered(run_id, journal.offset)
    while entries := journal.pending():
        for group, offset in _groups(entries):
            _send(client, run_id, group, journal)
            journal.delivered(run_id, offset)
            for entry in group:
                if entry["op"] == "artifact":
                    journal.detach(entry["kept"])


def _find_or_make(client: "MlflowClient", head: Head, name: str) -> str:
    experiment = store.experiment_id(client, head.experiment, head.artifacts)
    found = client.search_runs([experiment], filter_string=f"tags.`{JOURNAL_TAG}` = '{name}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {**head.tags, JOURNAL_TAG: name}
    if head.parent_id:
        tags["mlflow.parentRunId"] = head.parent_id
    made = client.create_run(experiment, start_time=head.start_time, tags=tags, run_name=head.name)
    return str(made.info.run_id)


def _groups(entries: list[tuple[dict[str, Any], int]]) -> list[tuple[list[dict[str, Any]], int]]:
    """Neighbouring metric entries together, everything else alone; each with the offset after it."""
    groups: list[tuple[list[dict[str, Any]], int]] = []
    points = 0
    for entry, offset in entries:
        size = len(entry["values"]) if entry["op"] == "metrics" else 0
        joins = groups and groups[-1][0][-1]["op"] == "metrics" == entry["op"]
        if joins and points + size <= _METRICS_PER_BATCH:
            groups[-1] = ([*groups[-1][0], entry], offset)
            points += size
        else:
            groups.append(([entry], offset))
            points = size
    return groups


def _send(client: "MlflowClient", run_id: str, group: list[dict[str, Any]], journal: Journal) -> None:
    """Send one group; entries that MLflow refuses for good are set aside with its reason."""
    try:
        _call(lambda: _apply(client, run_id, group, journal))
    except _Refused as error:
        if len(group) > 1:  # find the one that is refused
            for entry in group:
                _send(client, run_id, [entry], journal)
        else:
            log.warning("MLflow refuses an entry of %s (kept in rejected.jsonl): %s", journal.folder, error)
            journal.reject(group[0], str(error))


def _apply(client: "MlflowClient", run_id: str, group: list[dict[str, Any]], journal: Journal) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    entry = group[0]
    match entry["op"]:
        case "metrics":
            points = [
                Metric(key, float(value), one["time"], one["step"])
                for one in group
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
            kept = journal.folder / entry["kept"]
            if kept.is_dir():
                client.log_artifacts(run_id, str(kept), f"{entry['to']}/{kept.name}".strip("/"))
            else:
                client.log_artifact(run_id, str(kept), entry["to"] or None)
        case "resume":
            client.update_run(run_id, status="RUNNING")
        case "finish":
            client.set_terminated(run_id, status=entry["status"], end_time=entry["time"])
        case other:
            raise _Refused(f"unknown entry {other!r}")


class _Refused(Exception):
    """MLflow will never take this entry."""


def _call(action: Any) -> Any:
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
        if error.error_code in _PERMANENT:
            raise _Refused(str(error)) from error
        raise Unreachable(str(error)) from error
    except requests.HTTPError as error:  # artifacts answer with plain HTTP
        if error.response is not None and 400 <= error.response.status_code < 500:
            raise _Refused(str(error)) from error
        raise Unreachable(str(error)) from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _Refused(str(error)) from error
    except (OSError, SQLAlchemyError) as error:  # no connection; a locked sqlite file
        raise Unreachable(str(error)) from error


def _reject_rest(journal: Journal, reason: str) -> None:
    log.warning("MLflow does not know run %s; what was to be told to it is set aside", journal.head.run_id)
    for entry, offset in journal.pending(most=1_000_000):
        journal.reject(entry, reason)
        journal.delivered(str(journal.head.run_id), offset)


class Shipper(threading.Thread):
    """Delivers a journal in the background. A daemon: a hanging server never keeps the process alive."""

    def __init__(self, journal: Journal, interval: float = INTERVAL) -> None:
        super().__init__(name="vlv-mlflow", daemon=True)
        self._journal = journal
        self._interval = interval
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self.started_run = threading.Event()  # set when MLflow has given the run its id
        self.complete = False  # everything was delivered before the thread ended

    def run(self) -> None:
        pause = self._interval
        try:
            while True:
                closing = self._closing.is_set()  # read first: the last entries stand before it
                try:
                    deliver(self._journal)
                    pause = self._interval
                    self.started_run.set()
                    if closing:
                        self.complete = True
                        return
                except Exception as error:  # whatever ails the delivery, the run goes on
                    if pause == self._interval:
                        log.warning("MLflow is not told; the journal keeps it: %s", _first_line(error))
                    pause = min(_LONGEST_PAUSE, pause * 2)
                    if self._given_up.is_set():
                        return
                self._wake.wait(1.0 if self._closing.is_set() else pause)
                self._wake.clear()
        finally:
            if self.complete and not self._journal.resumable():
                self._journal.remove()
            self._journal.release()

    def close(self, seconds: float) -> bool:
        """Deliver what is left, for at most so many seconds; False: it stays in the outbox."""
        self._closing.set()
        self._wake.set()
        self.join(seconds)
        self._given_up.set()  # a thread that still hangs ends with its call, and frees the journal for a flush
        return self.complete


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
