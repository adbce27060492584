"""The journal of one run: what is to be told to MLflow, on disk, in order, until it has been told.

A folder with `head.json` (how to make the run), `journal.jsonl` (one entry a line), `sent.json` (the run's id
and how many bytes of the journal are delivered) and `attachments/`. No MLflow in here.
"""

import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock

from vlv import files


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
        self._write = threading.Lock()
        self._file = folder / "journal.jsonl"
        self._sent = folder / "sent.json"
        sent = files.read_json(self._sent) if self._sent.exists() else {}
        self.run_id: str | None = sent.get("run_id") or head.run_id
        self.offset: int = sent.get("offset", 0)

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
            FileNotFoundError: it has been delivered and removed.
        """
        if not (folder / "head.json").exists():
            raise FileNotFoundError(folder)
        lock = _locked(folder, wait)
        try:
            head = Head(**files.read_json(folder / "head.json"))
            journal = Journal(folder, head, lock)
            journal._cut_torn_line()
        except BaseException:
            lock.release()
            raise
        return journal

    def append(self, op: str, **values: Any) -> None:
        """Add one entry; it is on disk when this returns. Any thread may call it."""
        entry = {"op": op, "time": time.time_ns() // 1_000_000, **values}
        with self._write:
            files.append_json_line(self._file, entry)

    def attach(self, source: Path) -> str:
        """Keep a file or folder as it is now; the answer is its path below the journal's folder.

        Hard links where the file system has them: results are replaced by renaming (vlv.files), so a link
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
        if not self._file.exists():
            return []
        found: list[tuple[dict[str, Any], int]] = []
        position = self.offset
        with self._file.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n") or len(found) == most:
                    break
                position += len(line)
                found.append((json.loads(line), position))
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
        return files.read_json_lines(self._file)

    def resumable(self) -> bool:
        """Whether a restart will go on with this run: its resume file still names it."""
        if self.head.resume_file is None or not Path(self.head.resume_file).exists():
            return False
        return bool(files.read_json(Path(self.head.resume_file)).get("journal") == self.folder.name)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release(force=True)

    def remove(self) -> None:
        """Remove a delivered journal; one with refused entries stays for people to read."""
        if (self.folder / "rejected.jsonl").exists():
            (self.folder / "head.json").replace(self.folder / "head.delivered.json")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cut_torn_line(self) -> None:
        """A kill can leave half a line; appended to, it would spoil the next entry as well."""
        if not self._file.exists():
            return
        data = self._file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self._file, whole)


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
