"""The journal's answers as files that `vlv data import` takes, and a list of those that are no captions."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.caption_api.answers import FINAL, Journal
from vlv.io import files

CAPTIONS, UNUSABLE = "captions.parquet", "unusable.jsonl"
_ROWS = 10_000
_SCHEMA = pa.schema([(name, pa.string()) for name in ("sha256", "name", "caption")])


@dataclass(frozen=True)
class Exported:
    """Captions, answers that are none (by kind), and `.txt` files written and left as they were."""

    captions: int
    unusable: dict[str, int]
    sidecars: int = 0
    sidecars_there: int = 0


def export(journal: Journal, output: Path, beside: Path | None) -> Exported:
    """Write `output`/captions.parquet and unusable.jsonl; `beside`: also a .txt beside each image of this folder.

    A text that is there already stays as it is.
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
    files.write_json_lines(output / UNUSABLE, listed)
    return Exported(count, dict(sorted(Counter(line["kind"] for line in listed).items())), made, there)


def _lines(journal: Journal) -> Iterator[dict[str, Any]]:
    return (line for line in journal.lines() if "kind" in line)


def _write_beside(folder: Path, name: str, caption: str) -> bool | None:
    """True: written; False: another text is there; None: it is there already, or the image is not."""
    image = folder / name
    if not image.resolve().is_relative_to(folder.resolve()) or not image.is_file():
        return None
    path = image.with_suffix(".txt")
    if path.exists():
        return None if path.read_text(encoding="utf-8", errors="replace").strip() == caption else False
    files.write_text(path, caption + "\n")
    return True
