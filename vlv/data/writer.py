"""Writes shards: tars, table and manifest (vlv.data.shards describes them). Equal records give equal bytes."""

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.shards import MANIFEST, TABLE, Manifest, ShardEntry, SplitEntry
from vlv.io import files

# Called from time to time: what is being made, how many are done, how many there are in all.
Progress = Callable[[str, int, int], None]

# The columns of img2dataset, then ours. A failed sample has a row too, without a key.
TABLE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "url", "caption", "status", "error_message")]
    + [(name, pa.int64()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("sha256", "mode", "shard")]
)
# What we write into KEY.json besides the `meta` of a record.
WRITTEN = frozenset({"width", "height", "source", "sha256"})


@dataclass(frozen=True)
class Record:
    """A sample that is about to be written. With `image` None it is a failed sample: only the table gets a row.

    Sizes are in pixels. `url` says where the image came from; `meta` goes into KEY.json unchanged.
    """

    url: str
    image: bytes | None = None
    extension: str = "png"
    caption: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    mode: str | None = None
    status: str = "success"
    error_message: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Writes shard `number` into `folder`, sample by sample. Memory holds only the rows of its table.

    The tar is made with the first sample that has an image.
    """

    def __init__(self, folder: Path, number: int) -> None:
        if number >= 100_000:
            raise ValueError("more than 100,000 shards: a key has 5 digits for the shard; use larger shards")
        self._path, self._number = folder / f"{number:05d}.tar", number
        self._tar: tarfile.TarFile | None = None
        self.samples = 0
        self.rows: list[dict[str, Any]] = []

    def add(self, record: Record) -> None:
        """Append a record: its members to the tar (a failed sample has none) and its row to `rows`."""
        row: dict[str, Any] = {name: getattr(record, name, None) for name in TABLE_SCHEMA.names}
        if record.image is not None:
            if self._tar is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            key = f"{self._number:05d}{self.samples:04d}"
            digest = files.sha256_bytes(record.image)
            row |= {"key": key, "shard": self._path.name, "sha256": digest}
            for name, data in _members(record, record.image, digest).items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)  # owner 0, time 0, mode 0644 are TarInfo's defaults
                self._tar.addfile(info, BytesIO(data))
            self.samples += 1
        self.rows.append(row)

    def finish(self) -> ShardEntry | None:
        """Close the tar and return its entry for the manifest; None if it has no sample."""
        if self._tar is None:
            return None
        self._tar.close()
        digest, size = files.sha256_file(self._path), self._path.stat().st_size
        return ShardEntry(name=self._path.name, sha256=digest, bytes=size, samples=self.samples)


def _members(record: Record, image: bytes, digest: str) -> dict[str, bytes]:
    meta = {"width": record.width, "height": record.height, "source": record.url, **record.meta, "sha256": digest}
    members = {record.extension: image}
    if record.caption is not None:
        members["txt"] = record.caption.encode()
    members["json"] = to_json(meta)
    return members


def to_json(meta: dict[str, Any]) -> bytes:
    """The bytes of KEY.json, with sorted keys.

    Raises:
        ValueError: NaN, Infinity or a lone surrogate, which no JSON file may hold.
    """
    return json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def open_table(path: Path) -> pq.ParquetWriter:
    """Open a table of samples for writing. It is not compressed: two builds of a codec may write different bytes."""
    return pq.ParquetWriter(path, TABLE_SCHEMA, compression="none", store_schema=False)


def write_split(folder: Path, records: Iterable[Record], shard_size: int) -> SplitEntry:
    """Write the records, in their order, as tars of `shard_size` samples and a table. Memory holds one sample.

    `folder` must be new or empty, inside a folder that is put in place as a whole (files.atomic_folder).
    """
    if not 0 < shard_size <= 10_000:
        raise ValueError(f"shard_size {shard_size}: a key has 4 digits for the index, so 1 to 10000")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    with open_table(folder / TABLE) as table:
        for shard in _filled(folder, records, shard_size):
            table.write_table(pa.Table.from_pylist(shard.rows, TABLE_SCHEMA))
            entry = shard.finish()
            if entry is not None:
                shards.append(entry)
    samples = sum(shard.samples for shard in shards)
    return SplitEntry(samples=samples, shards=shards, table_sha256=files.sha256_file(folder / TABLE))


def _filled(folder: Path, records: Iterable[Record], shard_size: int) -> Iterator[ShardWriter]:
    """Shards of `shard_size` samples each; the failed samples between them are added too."""
    number, shard = 0, ShardWriter(folder, 0)
    for record in records:
        if record.image is not None and shard.samples == shard_size:
            yield shard
            number += 1
            shard = ShardWriter(folder, number)
        shard.add(record)
    if shard.rows:
        yield shard


def write_manifest(data: Path, manifest: Manifest) -> None:
    """Write manifest.json. It must be the last file that is written, because readers trust it."""
    files.write_json(data / MANIFEST, manifest.model_dump())
