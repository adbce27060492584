"""The journal: each answer is on disk before anything else happens with it, so a kill loses nothing paid for."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv.data.shards import DataError

FINAL = frozenset({"caption", "refused", "empty", "cut"})


def short(sha256: str) -> int:
    """A hash as a number of 8 bytes: millions of them fit in memory."""
    return int(sha256[:16], 16)


class Journal:
    """An append-only file of JSON lines; the first says what was asked of whom. Thread-safe.

    Lines have `sha256` and `name` of the image, `kind` (answers: `FINAL`; `lost`: a request that may have been
    billed without an answer), `text`, `tokens`, `cost`.

    Args:
        path: the file; made if it is not there. A last line that a kill cut short is removed.
        asked: model and prompt; answers to other questions are not mixed.
        again: images whose answer was no caption count as not asked.

    Raises:
        DataError: the file is damaged, or its answers are to another question.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, again: bool = False) -> None:
        self._path, self._lock = path, threading.Lock()
        self.answered: set[int] = set()
        self.spent = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _repair(path)
        fresh = not path.exists() or path.stat().st_size == 0
        if not fresh:
            self._load(asked, again)
        self._file = path.open("a", encoding="utf-8")
        if fresh:
            self.append({"asked": asked})

    def _load(self, asked: dict[str, Any], again: bool) -> None:
        lines = self.lines()
        before = next(lines).get("asked")
        if before != asked:
            known = before if isinstance(before, dict) else {}
            changed = sorted(key for key in {*known, *asked} if known.get(key) != asked.get(key))
            raise DataError(
                f"{self._path} has answers to another question ({', '.join(changed)} differ). Choose another folder "
                "with -o, or ask as before."
            )
        for line in lines:
            self.spent += float(line["cost"])
            if line["kind"] == "caption" or (line["kind"] in FINAL and not again):
                self.answered.add(short(line["sha256"]))

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines, one in memory."""
        with self._path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{self._path}, line {number} is damaged ({error}). Remove that line.") from error
                yield value

    def append(self, value: dict[str, Any]) -> None:
        """Write a line through to the disk."""
        with self._lock:
            self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _repair(path: Path) -> None:
    """Cut off what follows the last line end."""
    with path.open("r+b") as stream:
        end = size = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end != size:
            stream.truncate(end)
