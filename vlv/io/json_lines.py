"""JSON-lines files: JSON objects are appended one at a time, safely despite kills and parallel writers."""

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
    """Append one JSON object as a line and flush it to disk; first remove half a line that a kill left.

    The file is locked meanwhile, so threads and processes may append to the same file.
    """
    line = (files.to_json(value) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, rows: Iterable[Any]) -> None:
    """Write objects as JSON lines, atomically."""
    files.write_text(path, "".join(files.to_json(row) + "\n" for row in rows))


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut off what follows the last line end: it would damage the next line as well."""
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
    """Yield the complete lines of a JSON-lines file from byte `start` on, each with the position after it.

    A line that is not a JSON object is yielded as a `FileError`, which the caller raises or skips. A last line without
    a line end is incomplete and left out. A missing file has no lines. One line at a time is in memory.
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
    """The objects of a JSON-lines file; damaged lines, and objects that do not fit, are skipped with a warning."""
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
