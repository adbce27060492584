"""The journal of one run: what is to be told to MLflow, on disk, in order, until it has been told.

A folder with `head.json` (how to make the run), `journal.jsonl` (one entry a line), `sent.json` (the run's id
and how many bytes of the journal are delivered) and `attachments/`. No MLflow in here.
"""

import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
from pydantic import TypeAdapter, ValidationError

from vlv.io import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """What is needed to make the run, even days later by another process.

    `run_id` is set where the run already exists; `resume_file` names the file that a restart resumes from.
    """

    uri: str
    experiment: str
    artifacts: str | None
    name: str
    start_time: int  # milliseconds since 1970
    parent_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str | None = None
    resume_file: str | None = None


class Journal:
    """One run's journal. `create` and `open` take its lock, until `release` or the end of the process."""

    def __init__(self, folder: Path, head: Head, lock: filelock.BaseFileLock) -> None:
        self.folder = folder
        self.head = head
        self._lock = lock
        self._file = folder / "journal.jsonl"
        self._sent = folder / "sent.json"
        self.run_id: str | None = head.run_id
        self.offset = 0
        if self._sent.exists():
            self._load_sent()

    @staticmethod
    def create(outbox: Path, head: Head) -> "Journal":
        """Start a journal in a new folder of `outbox`."""
        folder = outbox / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        lock = _locked(folder)
        files.write_json(folder / "head.json", asdict(head))
        return Journal(folder, head, lock)

    @staticmethod
    def open(folder: Path, wait: float = 0) -> "Journal":
        """Go on with a journal whose writer is gone, waiting for its lock at most `wait` seconds.

        Raises:
            LockHeldError: its writer still lives.
            FileNotFoundError: it has been delivered and removed, or its head is damaged.
        """
        if not (folder / "head.json").exists():
            raise FileNotFoundError(folder)
        lock = _locked(folder, wait)
        try:
            return Journal(folder, _read_head(folder / "head.json"), lock)
        except files.FileError as error:
            lock.release()
            # Without its head nobody can make the run. What it was to be told stays for people to read.
            files.set_aside(folder / "head.json", error, f"the run whose journal is {folder} is not delivered")
            raise FileNotFoundError(folder) from error
        except BaseException:
            lock.release()
            raise

    def append(self, op: str, **values: Any) -> None:
        """Add one entry; it is on disk when this returns. Any thread may call it."""
        files.append_json_line(self._file, {"op": op, "time": time.time_ns() // 1_000_000, **values})

    def attach(self, source: Path) -> str:
        """Keep a file or folder as it is now; the answer is its path below the journal's folder.

        Hard links where the file system has them: results are replaced by renaming (vlv.io.files), so a link
        keeps the content of today without a second copy of the weights.
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

    def attach_bytes(self, data: bytes, name: str) -> str:
        """As `attach`, for content that is in memory."""
        kept = Path("attachments") / uuid.uuid4().hex[:12] / name
        (self.folder / kept).parent.mkdir(parents=True)
        (self.folder / kept).write_bytes(data)
        return kept.as_posix()

    def detach(self, kept: str) -> None:
        """Forget a delivered attachment."""
        shutil.rmtree((self.folder / kept).parent, ignore_errors=True)

    def pending(self, most: int = 500) -> list[tuple[dict[str, Any], int]]:
        """The next undelivered entries, each with the offset that says it and all before it are delivered."""
        found: list[tuple[dict[str, Any], int]] = []
        for entry, end in files.iterate_json_lines(self._file, self.offset):
            if isinstance(entry, files.FileError) or not _is_entry(entry):
                log.warning("%s: the entry that ends at byte %d is damaged and is not delivered", self._file, end)
                continue
            found.append((entry, end))
            if len(found) == most:
                break
        return found

    def delivered(self, run_id: str, offset: int) -> None:
        """Record how far MLflow has been told."""
        files.write_json(self._sent, {"run_id": run_id, "offset": offset})
        self.run_id, self.offset = run_id, offset

    def start_over(self) -> None:
        """Forget what was delivered: the run is gone from the server, and everything is to be told again."""
        self._sent.unlink(missing_ok=True)
        self.run_id, self.offset = None, 0

    def reject(self, entry: Mapping[str, Any], reason: str) -> None:
        """Keep an entry that MLflow refuses for good, so that it does not hold up the others."""
        files.append_json_line(self.folder / "rejected.jsonl", {**entry, "reason": reason})

    def entries(self) -> list[dict[str, Any]]:
        """All entries from the start."""
        return files.read_json_lines(self._file, _is_entry)

    def resumable(self) -> bool:
        """Whether a restart will go on with this run: its resume file still names it."""
        if self.head.resume_file is None or not Path(self.head.resume_file).exists():
            return False
        try:
            return bool(files.read_json_object(Path(self.head.resume_file)).get("journal") == self.folder.name)
        except files.FileError:  # damaged; whoever resumes may still find this journal
            return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release(force=True)

    def remove(self) -> None:
        """Remove a delivered journal; one with refused entries stays for people to read."""
        if (self.folder / "rejected.jsonl").exists():
            (self.folder / "head.json").replace(self.folder / "head.delivered.json")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _load_sent(self) -> None:
        """How far MLflow has been told. Where that cannot be known all is told again, which changes nothing there."""
        try:
            sent = files.read_json_object(self._sent)
            run_id, offset = sent.get("run_id"), sent.get("offset")
            if not isinstance(run_id, str) or not isinstance(offset, int) or not self._is_line_end(offset):
                raise files.FileError(f"{self._sent} does not fit {self._file.name}.")
        except files.FileError as error:
            files.set_aside(self._sent, error, "MLflow is told everything again")
        else:
            self.run_id, self.offset = run_id, offset

    def _is_line_end(self, offset: int) -> bool:
        if offset <= 0 or not self._file.exists():
            return offset == 0
        with self._file.open("rb") as file:
            file.seek(offset - 1)
            return file.read(1) == b"\n"


# What each entry needs besides its time.
_FIELDS: dict[str, dict[str, type]] = {
    "metrics": {"step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "dataset": {"dataset": dict, "context": str},
    "artifact": {"kept": str, "to": str},
    "resume": {},
    "finish": {"status": str},
}


def _is_entry(entry: Mapping[str, Any]) -> bool:
    fields = _FIELDS.get(str(entry.get("op")))
    if fields is None or not isinstance(entry.get("time"), int):
        return False
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def _read_head(path: Path) -> Head:
    try:
        return TypeAdapter(Head).validate_python(files.read_json_object(path))
    except ValidationError as error:
        raise files.FileError(f"{path} does not say how to make a run ({error.errors()[0]['msg']}).") from error


def resumed_by(folder: Path) -> str | None:
    """The resume file that a journal's folder names."""
    try:
        return _read_head(folder / "head.json").resume_file
    except files.FileError:
        return None


def journals(outbox: Path) -> list[Path]:
    """Folders of the undelivered journals, oldest first."""
    return sorted(head.parent for head in outbox.glob("*/head.json"))


def encode(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metric values as JSON has them: a loss may be NaN or infinite, and that must be seen, not refused."""
    return {key: float(value) if math.isfinite(value) else str(float(value)) for key, value in values.items()}


def params_given(entries: Iterable[Mapping[str, Any]]) -> set[str]:
    """The parameters journalled; MLflow keeps a parameter's first value."""
    return {key for entry in entries if entry["op"] == "params" for key in entry["values"]}


def last_steps(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The highest step journalled for each metric."""
    last: dict[str, int] = {}
    for entry in entries:
        if entry["op"] == "metrics":
            for key in entry["values"]:
                last[key] = max(entry["step"], last.get(key, entry["step"]))
    return last


def curve(entries: Iterable[Mapping[str, Any]], keys: Collection[str]) -> dict[int, dict[str, float]]:
    """The points of the entries that have all of `keys`, step -> values."""
    points = {}
    for entry in entries:
        if entry["op"] == "metrics" and all(key in entry["values"] for key in keys):
            points[entry["step"]] = {key: float(entry["values"][key]) for key in keys}
    return points


def _locked(folder: Path, wait: float = 0) -> filelock.BaseFileLock:
    folder.mkdir(parents=True, exist_ok=True)
    # Not thread-local: the thread that ships the last entry gives back what the main thread took.
    lock = filelock.FileLock(folder / ".lock", timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise files.LockHeldError(f"{folder} belongs to a run that is still going on") from error
    return lock


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
