"""Reads all of the data into two tables for the gate. Damage becomes a value in a table, not an exception."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data import shards
from vlv.data.shards import DataError, Manifest, Sample, SplitEntry
from vlv.data.vocabulary import Count, Coverage, Vocabulary
from vlv.io import files, images


@dataclass
class FileRow:
    """A shard or a table of samples, beside what the manifest says about it. `damage`: why it cannot be read."""

    where: str
    split: str
    exists: bool = True
    listed: bool = True
    bytes: int | None = None
    manifest_bytes: int | None = None
    sha256: str | None = None
    manifest_sha256: str | None = None
    samples: int | None = None
    manifest_samples: int | None = None
    damage: str | None = None


@dataclass
class SampleRow:
    """What the bytes of a sample are, beside what its JSON and samples.parquet say. Sizes are in pixels.

    Attributes:
        duplicate_of: the first sample of the same split with the same image.
        image_also_in, scene_also_in: the first sample of an earlier split with the same image, or the same scene (the
            ground truth of drawn data).
        unknown_words: words of the caption that the tokenizer does not hold; "" if it holds them all, None without a
            caption or a tokenizer.
    """

    where: str
    split: str
    sha256: str
    json_sha256: str | None = None
    table_sha256: str | None = None
    image_error: str | None = None
    width: int | None = None
    height: int | None = None
    json_width: int | None = None
    json_height: int | None = None
    short_side: int | None = None
    aspect: float | None = None
    mode: str | None = None
    caption: str | None = None
    caption_words: int | None = None
    unknown_words: str | None = None
    duplicate_of: str | None = None
    image_also_in: str | None = None
    scene_also_in: str | None = None


@dataclass(frozen=True)
class Inspection:
    """One row for each file and for each sample that could be read, of all splits.

    `vocabulary`: how much of each split's captions the tokenizer holds; empty without one.
    """

    files: pd.DataFrame
    samples: pd.DataFrame
    vocabulary: dict[str, Coverage]


def inspect(data: Path, manifest: Manifest, splits: list[str], vocabulary: Vocabulary | None = None) -> Inspection:
    """Read every shard and table of the splits. Memory holds the pixels of one sample at a time."""
    inspector = _Inspector(data, vocabulary)
    for split in splits:
        inspector.split(split, manifest.splits[split])
    held = {split: count.coverage() for split, count in inspector.held.items()}
    return Inspection(_frame(FileRow, inspector.files), _frame(SampleRow, inspector.samples), held)


def _frame(kind: type, rows: list[Any]) -> pd.DataFrame:
    """Columns of objects, so that a missing value stays None and an integer stays an integer."""
    names = [field.name for field in fields(kind)]
    return pd.DataFrame({name: pd.Series([getattr(row, name) for row in rows], dtype=object) for name in names})


class _Inspector:
    def __init__(self, data: Path, vocabulary: Vocabulary | None) -> None:
        self._data, self._vocabulary = data, vocabulary
        self.held: dict[str, Count] = {}
        self.files: list[FileRow] = []
        self.samples: list[SampleRow] = []
        self._images: dict[str, tuple[str, str]] = {}  # image hash -> split, where it was first
        self._scenes: dict[str, tuple[str, str]] = {}

    def split(self, name: str, entry: SplitEntry) -> None:
        if self._vocabulary is not None:
            self.held[name] = Count()
        folder = self._data / name
        hashes = self._table(folder / shards.TABLE, name, entry)
        for shard in entry.shards:
            row = self._file(folder / shard.name, name)
            row.manifest_bytes, row.manifest_sha256 = shard.bytes, shard.sha256
            row.manifest_samples = shard.samples
            if row.exists:
                self._shard(folder / shard.name, row, hashes)
        known = {shard.name for shard in entry.shards} | {shards.TABLE}
        for path in sorted(folder.glob("*")):
            if path.name not in known:
                self._file(path, name).listed = False

    def _file(self, path: Path, split: str) -> FileRow:
        row = FileRow(where=f"{split}/{path.name}", split=split, exists=path.is_file())
        if row.exists:
            row.bytes, row.sha256 = path.stat().st_size, files.sha256_file(path)
        self.files.append(row)
        return row

    def _table(self, path: Path, split: str, entry: SplitEntry) -> dict[str, str]:
        """The image hashes in samples.parquet by key; empty if it cannot be read."""
        row = self._file(path, split)
        row.manifest_sha256, row.manifest_samples = entry.table_sha256, entry.samples
        if not row.exists:
            return {}
        try:
            rows = pq.read_table(path, columns=["key", "sha256", "status"]).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            row.damage = str(error).splitlines()[0]
            return {}
        good = [one for one in rows if one["status"] == "success"]
        row.samples = len(good)
        return {one["key"]: one["sha256"] for one in good}

    def _shard(self, path: Path, row: FileRow, hashes: dict[str, str]) -> None:
        row.samples = 0
        try:
            for sample in shards.scan_shard(path):
                row.samples += 1
                self._sample(sample, f"{row.where} sample {sample.key}", row.split, hashes.get(sample.key))
        except DataError as error:
            row.damage = str(error)

    def _sample(self, sample: Sample, where: str, split: str, table_sha256: str | None) -> None:
        row = SampleRow(where, split, files.sha256_bytes(sample.image), table_sha256=table_sha256)
        row.json_sha256 = sample.meta.get("sha256")
        row.json_width, row.json_height = sample.meta.get("width"), sample.meta.get("height")
        row.caption = sample.caption
        row.caption_words = None if sample.caption is None else len(sample.caption.split())
        if self._vocabulary is not None and sample.caption is not None:
            unknown = self._vocabulary.unknown(sample.caption)
            row.unknown_words = " ".join(unknown)
            self.held[split].add(sample.caption, unknown)
        try:
            images.decode(sample.image)
            row.width, row.height, row.mode = images.header(sample.image)
            row.short_side = min(row.width, row.height)
            row.aspect = max(row.width, row.height) / row.short_side
        except images.ImageError as error:
            row.image_error = str(error)
        first_split, first = self._images.setdefault(row.sha256, (split, where))
        if first != where:
            if first_split == split:
                row.duplicate_of = first
            else:
                row.image_also_in = first
        if "scene" in sample.meta:
            first_split, first = self._scenes.setdefault(repr(sample.meta["scene"]), (split, where))
            row.scene_also_in = first if first_split != split else None
        self.samples.append(row)
