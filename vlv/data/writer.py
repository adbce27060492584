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

from vlv import files
from vlv.data.shards import MANIFEST, TABLE, Manifest, ShardEntry, SplitEntry

# Called now and then with what is made, how many are done, and of how many.
Progress = Callable[[str, int, int], None]

# Columns as img2dataset's, then ours. Failed samples have a row too, with no key.
TABLE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "url", "caption", "status", "error_message")]
    + [(name, pa.int64()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("sha256", "mode", "shard")]
)


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


def write_split(folder: Path, records: Iterable[Record], shard_size: int) -> SplitEntry:
    """Write the records in their order as tars of `shard_size` samples and a table; one shard in memory.

    `folder` must be new or empty and belongs to a folder that is swapped in as a whole (files.atomic_folder).
    """
    if not 0 < shard_size <= 10_000:
        raise ValueError(f"shard_size {shard_size}: a key has 4 digits for the index, so 1 to 10000")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    # No compression: two builds of one codec may write different bytes, and the data's hash depends on them.
    with pq.ParquetWriter(folder / TABLE, TABLE_SCHEMA, compression="none", store_schema=False) as table:
        for number, chunk in enumerate(_chunks(records, shard_size)):
            if number >= 100_000:
                raise ValueError("more than 100,000 shards: a key has 5 digits for the shard; use larger shards")
            table.write_table(pa.Table.from_pylist(_rows(chunk, number), TABLE_SCHEMA))
            good = [record for record in chunk if record.image is not None]
            if good:
                shards.append(_write_shard(folder / f"{number:05d}.tar", number, good))
    samples = sum(shard.samples for shard in shards)
    return SplitEntry(samples=samples, shards=shards, table_sha256=files.sha256_file(folder / TABLE))


def _chunks(records: Iterable[Record], shard_size: int) -> Iterator[list[Record]]:
    """Runs of records with `shard_size` good ones each; failed ones come along."""
    chunk: list[Record] = []
    good = 0
    for record in records:
        if record.image is not None and good == shard_size:
            yield chunk
            chunk, good = [], 0
        chunk.append(record)
        good += record.image is not None
    if chunk:
        yield chunk


def _rows(chunk: list[Record], number: int) -> list[dict[str, Any]]:
    rows, index = [], 0
    for record in chunk:
        row: dict[str, Any] = {name: getattr(record, name, None) for name in TABLE_SCHEMA.names}
        if record.image is not None:
            row |= {"key": f"{number:05d}{index:04d}", "shard": f"{number:05d}.tar"}
            row["sha256"] = files.sha256_bytes(record.image)
            index += 1
        rows.append(row)
    return rows


def _write_shard(path: Path, number: int, records: list[Record]) -> ShardEntry:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, record in enumerate(records):
            image = record.image or b""
            meta = {"width": record.width, "height": record.height, "source": record.url, **record.meta}
            meta["sha256"] = files.sha256_bytes(image)
            members = {record.extension: image}
            if record.caption is not None:
                members["txt"] = record.caption.encode()
            members["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}{index:04d}.{extension}")
                info.size = len(data)  # owner 0, time 0, mode 0644 are TarInfo's defaults
                tar.addfile(info, BytesIO(data))
    digest, size = files.sha256_file(path), path.stat().st_size
    return ShardEntry(name=path.name, sha256=digest, bytes=size, samples=len(records))


def write_manifest(data: Path, manifest: Manifest) -> None:
    """Write manifest.json; last of all, since it vouches for the rest."""
    files.write_json(data / MANIFEST, manifest.model_dump())
