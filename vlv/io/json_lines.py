"""JSON lines: a file to which one JSON object is appended at a time, safe against kills and parallel writers."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from vlv.io import files

log = logging.getLogger(__name__)

_REMEDY = "Restore it, or remove it and run the command again."


def append(path: Path, value: Any) -> None:
    """Append one JSON object as a line and flush it to disk; half a line that a kill left is removed first.

    The file is locked meanwhile: threads and processes may append to the same one.
    """
    line = (files.to_json(value) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, rows: Iterable[Any]) -> None:
    """Write objects as lines of JSON, atomically."""
    files.write_text(path, "".join(files.to_json(row) + "\n" for row in rows))


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut off what follows the last line end: appended to, it would spoil the next line as well."""
    end = size = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        file.truncate(end)


def iterate(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any] | files.FileError, int]]:
    """The finished lines of a JSON-lines file from byte `start` on, one in memory, each with the byte after it.

    A line that is no JSON object comes as the `FileError` that says so, for the caller to raise or to pass over. A last
    line without its end was never finished and does not come. No file: no lines.
    """
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.FileError(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from error
    position = start
    with opened as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            if not line.strip():
                continue
            name = f"{path}, the line that ends at byte {position},"
            try:
                value = files.parse_json(line, name, "Remove that line.")
                yield files.expect_mapping(value, name, "JSON object", ""), position
            except files.FileError as error:
                yield error, position


def read(path: Path, fits: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; damaged lines, and objects that do not fit, are passed over with a warning."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    for row, _ in iterate(path):
        if isinstance(row, files.FileError) or not fits(row):
            damaged += 1
        else:
            rows.append(row)
    if damaged:
        log.warning("%s: %d damaged lines are passed over, %d are whole", path, damaged, len(rows))
    return rows
