"""The journal of answers, and the files that are made from it.

Each answer is written to disk before it is used, so a kill loses no answer that was paid for.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.shards import DataError
from vlv.io import files, json_lines

FINAL = frozenset({"caption", "refused", "empty", "cut"})


def short(sha256: str) -> int:
    """The first 8 bytes of a hash as a number; millions of them fit in memory."""
    return int(sha256[:16], 16)


class Journal:
    """An append-only file of JSON lines. The first line says which model was asked, and what. Thread-safe.

    The other lines have `sha256` and `name` of the image, `kind` (an answer: one of `FINAL`; `lost`: a request that may
    have been billed without an answer), `text`, `tokens` and `cost`.

    Args:
        path: the file; it is made if it does not exist. A last line that a kill cut short is ignored.
        asked: model and prompt. A file never mixes answers to different questions.
        again: treat images whose answer was no caption as not asked.

    Raises:
        DataError: the file is damaged, or it holds answers to another question.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, again: bool = False) -> None:
        self._path = path
        self.answered: set[int] = set()
        self.spent = 0.0
        if any(True for _ in json_lines.iterate(path)):
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
                f"{self._path} holds answers to another question ({', '.join(changed)} differ). Choose another folder "
                "with -o, or ask as before."
            )
        for line in lines:
            self.spent += float(line["cost"])
            if line["kind"] == "caption" or (line["kind"] in FINAL and not again):
                self.answered.add(short(line["sha256"]))

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines; memory holds one of them."""
        for row, end in json_lines.iterate(self._path):
            if isinstance(row, files.FileError):
                raise DataError(str(row)) from row
            if "asked" not in row and not _is_answer(row):
                raise DataError(f"{self._path}, the line that ends at byte {end}, is not an answer. Remove that line.")
            yield row

    def append(self, value: dict[str, Any]) -> None:
        """Append a line and flush it to the disk."""
        json_lines.append(self._path, value)


def _is_answer(row: dict[str, Any]) -> bool:
    is_hash = isinstance(row.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", row["sha256"]) is not None
    return is_hash and isinstance(row.get("kind"), str) and isinstance(row.get("cost"), int | float)


CAPTIONS, UNUSABLE = "captions.parquet", "unusable.jsonl"
_ROWS = 10_000
_SCHEMA = pa.schema([(name, pa.string()) for name in ("sha256", "name", "caption")])


@dataclass(frozen=True)
class Exported:
    """How many captions were exported, how many answers are unusable (by kind), and what became of the `.txt` files.

    `sidecars`: written beside images. `sidecars_there`: another text was there and stays.
    """

    captions: int
    unusable: dict[str, int]
    sidecars: int = 0
    sidecars_there: int = 0


def export(journal: Journal, output: Path, beside: Path | None) -> Exported:
    """Write `output`/captions.parquet and unusable.jsonl.

    `beside`: also write a .txt file beside each image in this folder. A file that exists already stays as it is.
    """
    unusable = {line["sha256"]: line for line in _lines(journal) if line["kind"] in FINAL and line["kind"] != "caption"}
    count, made, there = 0, 0, 0
    with files.atomic_path(output / CAPTIONS) as path, pq.ParquetWriter(path, _SCHEMA) as table:
        rows: list[dict[str, Any]] = []
        for line in _lines(journal):
            if line["kind"] != "caption":
                continue
            unusable.pop(line["sha256"], None)  # asked again, and answered
            rows.append({"sha256": line["sha256"], "name": line["name"], "caption": line["text"]})
            count += 1
            if beside is not None:
                new = _write_beside(beside, line["name"], line["text"])
                made, there = made + (new is True), there + (new is False)
            if len(rows) == _ROWS:
                table.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        table.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    listed = [{name: line[name] for name in ("name", "kind", "text", "sha256")} for line in unusable.values()]
    json_lines.write(output / UNUSABLE, listed)
    return Exported(count, dict(sorted(Counter(line["kind"] for line in listed).items())), made, there)


def _lines(journal: Journal) -> Iterator[dict[str, Any]]:
    return (line for line in journal.lines() if "kind" in line)


def _write_beside(folder: Path, name: str, caption: str) -> bool | None:
    """True: written. False: another text is there. None: the same text is there, or the image is not."""
    image = folder / name
    if not image.resolve().is_relative_to(folder.resolve()) or not image.is_file():
        return None
    path = image.with_suffix(".txt")
    if path.exists():
        return None if path.read_text(encoding="utf-8", errors="replace").strip() == caption else False
    files.write_text(path, caption + "\n")
    return True
