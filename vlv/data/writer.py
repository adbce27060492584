"""Writes shards: tars, table and manifest (vlv.data.shards has the form). Equal records give equal bytes."""

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

# Called now and then with what is made, how many are done, and of how many.
Progress = Callable[[str, int, int], None]

# Columns as img2dataset's, then ours. Failed samples have a row too, with no key.
TABLE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "url", "caption", "status", "error_message")]
    + [(name, pa.int64()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("sha256", "mode", "shard")]
)
# What KEY.json has besides a record's `meta`.
WRITTEN = frozenset({"width", "height", "source", "sha256"})


@dataclass(frozen=True)
class Record:
    """A sample on its way into a shard; `image` None: a failed one, of which only the table keeps a row.

    Sizes are in pixels. `url` says where the image came from, `meta` goes into KEY.json as it is.
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
    """Writes shard `number` into `folder`, sample by sample; only the rows of its table are kept in memory.

    No tar is made as long as no sample has an image.
    """

    def __init__(self, folder: Path, number: int) -> None:
        if number >= 100_000:
            raise ValueError("more than 100,000 shards: a key has 5 digits for the shard; use larger shards")
        self._path, self._number = folder / f"{number:05d}.tar", number
        self._tar: tarfile.TarFile | None = None
        self.samples = 0
        self.rows: list[dict[str, Any]] = []

    def add(self, record: Record) -> None:
        """Append a record: its members to the tar (a failed one has none) and its row to `rows`."""
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
        """Close the tar; what the manifest says about it, None if there is no sample."""
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
    """What KEY.json holds, keys sorted.

    Raises:
        ValueError: it has NaN, Infinity or half characters (lone surrogates), which no JSON file may hold.
    """
    return json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def open_table(path: Path) -> pq.ParquetWriter:
    """A table of samples to write. No compression: two builds of one codec may write different bytes."""
    return pq.ParquetWriter(path, TABLE_SCHEMA, compression="none", store_schema=False)


def write_split(folder: Path, records: Iterable[Record], shard_size: int) -> SplitEntry:
    """Write the records in their order as tars of `shard_size` samples and a table; one sample in memory.

    `folder` must be new or empty and belongs to a folder that is swapped in as a whole (files.atomic_folder).
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
    """Shards of `shard_size` good records each; failed ones come along."""
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
    """Write manifest.json; last of all, since it vouches for the rest."""
    files.write_json(data / MANIFEST, manifest.model_dump())
