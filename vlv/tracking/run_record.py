"""The record of one run: everything that MLflow is to be told, in one append-only file on disk.

A record is a folder. `record.jsonl` has one entry a line: how to make the run (`begin`), then parameters, points,
artifacts and the end, and between them notes of what MLflow has been told (`told`). `attachments/` holds the files to
be sent. The folder's name is the run's identity, so no damage to the file turns one run into two. MLflow is not
imported here: `vlv.tracking.replay` reads the record and tells MLflow.
"""

import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
from pydantic import TypeAdapter, ValidationError

from vlv.io import files, json_lines

NAME = "record.jsonl"
_REFUSED_NAME = "refused.jsonl"  # what a delivered record becomes where MLflow refused entries


@dataclass(frozen=True)
class Begin:
    """What is needed to make the run, even days later by another process."""

    uri: str
    experiment: str
    artifacts: str | None
    name: str
    start_time: int  # milliseconds since 1970
    parent_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """An entry that MLflow has not been told, and the byte after its line."""

    entry: dict[str, Any]
    end: int


class RunRecord:
    """One run's record. `create` and `open` take its lock, until `close` or the end of the process.

    Attributes:
        begin: how to make the run; None where damage took that line.
        run_id: MLflow's id of the run; None until MLflow has given one.
        refused: whether MLflow has refused an entry for good.
        ended: whether the last thing recorded is the end of the run.
        last_steps: metric -> the highest step recorded.
        params: the parameters recorded. MLflow keeps a parameter's first value.
    """

    def __init__(self, folder: Path, lock: filelock.BaseFileLock) -> None:
        self.folder = folder
        self.begin: Begin | None = None
        self.run_id: str | None = None
        self.refused = self.ended = False
        self.last_steps: dict[str, int] = {}
        self.params: set[str] = set()
        self._lock = lock
        self._file = folder / NAME
        self._mutex = threading.Lock()
        self._number = 0  # of the last entry
        self._told = 0  # number of the last entry that MLflow has been told
        self._offset = 0  # bytes that need not be read again to find what is pending
        self._sealed = self._closed = False
        for entry in read(self._file):
            self._note(entry)

    @staticmethod
    def create(parent: Path, begin: Begin) -> "RunRecord":
        """Start a record in a new folder of `parent`."""
        folder = parent / f"run-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        record = RunRecord(folder, _locked(folder))
        record.begin_with(begin)
        return record

    @staticmethod
    def open(folder: Path, wait: float = 0) -> "RunRecord":
        """Open a record whose writer is gone. Waits for its lock at most `wait` seconds.

        Raises:
            LockHeldError: its writer still lives.
            FileNotFoundError: it has been delivered and removed.
        """
        if not (folder / NAME).exists():
            raise FileNotFoundError(folder)
        lock = _locked(folder, wait)
        try:
            return RunRecord(folder, lock)
        except BaseException:
            lock.release()
            raise

    def begin_with(self, begin: Begin) -> None:
        """Record how to make the run. If the record has entries, all of them go to MLflow at `begin.uri`."""
        self.append("begin", begin=asdict(begin))
        self._offset = 0

    def append(self, op: str, **values: Any) -> bool:
        """Add one entry; it is on disk when this returns. Any thread may call it.

        Nothing is added after the end of the run or after `close` (False).
        """
        with self._mutex:
            if self._sealed and op not in _NOTES:
                return False
            return self._append(op, values)

    def finish(self, status: str) -> None:
        """Record the end. What another thread logs after it is dropped."""
        with self._mutex:
            self._append("finish", {"status": status})
            self._sealed = True

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add points at a step. A point is dropped where its curve has this step or a later one."""
        with self._mutex:
            fresh = {key: value for key, value in values.items() if step > self.last_steps.get(key, -1)}
            if fresh and not self._sealed:
                self._append("metrics", {"step": step, "values": {key: _encoded(one) for key, one in fresh.items()}})

    def attach(self, source: Path) -> str:
        """Keep a file or folder as it is now; returns its path below the record's folder.

        Files are linked where the file system can do it: results are replaced by renaming (vlv.io.files), so a link
        keeps the content of today without a second copy of the weights.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist, so it cannot be logged to MLflow")
        kept = Path("attachments") / uuid.uuid4().hex[:12] / source.name
        target = self.folder / kept
        target.parent.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
        else:
            _link(source, target)
        return kept.as_posix()

    def pending(self, most: int = 500) -> list[Pending]:
        """The next entries that MLflow has not been told, at most `most`."""
        found: list[Pending] = []
        for entry, end in json_lines.iterate(self._file, self._offset):
            if isinstance(entry, files.FileError) or not _fits(entry):
                continue  # `open` has named the damaged lines
            if entry["n"] > self._told and entry["op"] not in _NOTES:
                found.append(Pending(entry, end))
                if len(found) == most:
                    break
        return found

    def waits(self) -> bool:
        """Whether MLflow can be told something that it has not been told."""
        return self.begin is not None and (self.run_id is None or bool(self.pending(most=1)))

    def told(self, run_id: str, entries: Sequence[Pending] = ()) -> bool:
        """Note what MLflow has been told: the run's id, and entries up to the last of these. False after `close`."""
        if not self.append("told", run_id=run_id, upto=entries[-1].entry["n"] if entries else self._told):
            return False
        for one in entries:
            self._offset = one.end
            kept = (self.folder / str(one.entry.get("kept"))).parent
            if kept.parent == self.folder / "attachments":
                shutil.rmtree(kept, ignore_errors=True)
        return True

    def close(self) -> None:
        """Give the lock back. A thread that is still sending writes nothing here from now on."""
        with self._mutex:
            self._closed = True
            self._lock.release(force=True)

    def remove(self) -> None:
        """Remove a delivered record; one with refused entries stays, under another name, for people to read."""
        if self.refused:
            self._file.replace(self.folder / _REFUSED_NAME)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def copy_to(self, parent: Path) -> None:
        """Copy the record into another folder, whole or not at all. It takes the place of an earlier copy."""
        with files.atomic_folder(parent / self.folder.name) as temporary:
            shutil.copy2(self._file, temporary / NAME)
            if (self.folder / "attachments").exists():
                shutil.copytree(self.folder / "attachments", temporary / "attachments", copy_function=_link)

    def _append(self, op: str, values: Mapping[str, Any]) -> bool:
        if self._closed:
            return False
        entry = {"n": self._number + 1, "op": op, "time": time.time_ns() // 1_000_000, **values}
        json_lines.append(self._file, entry)
        self._note(entry)
        return True

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of the file into account."""
        self._number = max(self._number, entry["n"])
        match entry["op"]:
            case "begin":
                try:
                    self.begin = TypeAdapter(Begin).validate_python(entry["begin"])
                except ValidationError:
                    return
                self.run_id, self._told = None, 0
            case "told":
                self.run_id, self._told = entry["run_id"], entry["upto"]
            case "refused":
                self.refused = True
            case "metrics":
                step = entry["step"]
                self.last_steps |= {key: max(step, self.last_steps.get(key, step)) for key in entry["values"]}
            case "params":
                self.params.update(entry["values"])
        if entry["op"] not in _NOTES:
            self.ended = entry["op"] == "finish"


_NOTES = {"begin", "told", "refused"}  # MLflow is not told these
# What each kind of entry needs besides its number and its time.
_FIELDS: dict[str, dict[str, type]] = {
    "begin": {"begin": dict},
    "metrics": {"step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "dataset": {"dataset": dict, "context": str},
    "artifact": {"kept": str, "to": str},
    "resume": {},
    "finish": {"status": str},
    "told": {"run_id": str, "upto": int},
    "refused": {"entry": dict, "reason": str},
}


def _fits(entry: Mapping[str, Any]) -> bool:
    fields = {"n": int, "time": int, **_FIELDS.get(str(entry.get("op")), {"op": type(None)})}
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a record's file; damaged lines are left out with a warning."""
    return json_lines.read(path, _fits)


def curve(entries: Collection[Mapping[str, Any]], keys: Collection[str]) -> dict[int, dict[str, float]]:
    """The points of the entries that have all of `keys`: step -> values."""
    return {
        entry["step"]: {key: float(entry["values"][key]) for key in keys}
        for entry in entries
        if entry["op"] == "metrics" and all(key in entry["values"] for key in keys)
    }


def folders(*parents: Path) -> Iterator[Path]:
    """Folders of the records right below each of `parents`, oldest first."""
    yield from sorted((path.parent for one in parents for path in one.glob(f"run-*/{NAME}")), key=lambda one: one.name)


def _encoded(value: float) -> float | str:
    """A number as JSON has it: a loss may be NaN or infinite, and people must see that."""
    return float(value) if math.isfinite(value) else str(float(value))


def _locked(folder: Path, wait: float = 0) -> filelock.BaseFileLock:
    folder.mkdir(parents=True, exist_ok=True)
    # Not thread-local: another thread than the one that took the lock may give it back.
    lock = filelock.FileLock(folder / ".lock", timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise files.LockHeldError(f"{folder} belongs to a run that is still active") from error
    return lock


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
