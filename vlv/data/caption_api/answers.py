"""The journal: each answer is on disk before anything else happens with it, so a kill loses nothing paid for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv.data.shards import DataError
from vlv.io import files

FINAL = frozenset({"caption", "refused", "empty", "cut"})


def short(sha256: str) -> int:
    """A hash as a number of 8 bytes: millions of them fit in memory."""
    return int(sha256[:16], 16)


class Journal:
    """An append-only file of JSON lines; the first says what was asked of whom. Thread-safe.

    Lines have `sha256` and `name` of the image, `kind` (answers: `FINAL`; `lost`: a request that may have been
    billed without an answer), `text`, `tokens`, `cost`.

    Args:
        path: the file; made if it is not there. A last line that a kill cut short does not count.
        asked: model and prompt; answers to other questions are not mixed.
        again: images whose answer was no caption count as not asked.

    Raises:
        DataError: the file is damaged, or its answers are to another question.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, again: bool = False) -> None:
        self._path = path
        self.answered: set[int] = set()
        self.spent = 0.0
        if any(True for _ in files.iterate_json_lines(path)):
            self._load(asked, again)
        else:
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
        for row, end in files.iterate_json_lines(self._path):
            if isinstance(row, files.FileError):
                raise DataError(str(row)) from row
            if "asked" not in row and not _is_answer(row):
                raise DataError(f"{self._path}, the line that ends at byte {end}, is no answer. Remove that line.")
            yield row

    def append(self, value: dict[str, Any]) -> None:
        """Write a line through to the disk."""
        files.append_json_line(self._path, value)


def _is_answer(row: dict[str, Any]) -> bool:
    is_hash = isinstance(row.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", row["sha256"]) is not None
    return is_hash and isinstance(row.get("kind"), str) and isinstance(row.get("cost"), int | float)
