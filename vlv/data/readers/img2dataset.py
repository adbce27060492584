"""What img2dataset writes besides tars: a parquet file for each shard, and its "files" layout.

The parquet file has one row for each URL, failed ones included.
"""

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers.columns import DAMAGE
from vlv.data.readers.folder import FolderReader
from vlv.data.readers.found import Found
from vlv.data.readers.schema import pylist

_ROWS = 1024  # read at a time


def is_table(path: Path) -> bool:
    """Whether a parquet file is such a table (and not a set of images)."""
    try:
        names = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False
    return {"key", "status", "url"} <= names and "jpg" not in names


def is_files_layout(folder: Path) -> bool:
    """Whether a folder is the "files" layout: tables, and beside each a folder of its name."""
    tables = sorted(folder.glob("*.parquet"))[:1]
    return bool(tables) and is_table(tables[0]) and (folder / tables[0].stem).is_dir()


def failures(table: Path, present: Set[str] | None) -> Iterator[tuple[str, str, str]]:
    """URL, reason and message of each row without an image.

    The reason is img2dataset's status (`failed_to_download`, `failed_to_resize`), or `missing_in_tar` if the status is
    success and the key is not in `present`. A table that cannot be read gives one row, `damaged_file`.
    """
    try:
        for row in _rows(table):
            status, key = str(row["status"]), str(row["key"])
            where = str(row.get("url") or f"{table.stem}/{key}")
            if status != "success":
                yield where, status, str(row.get("error_message") or "img2dataset gives no reason")
            elif present is not None and key not in present:
                yield where, "missing_in_tar", f"{table.name} lists {key}, the tar does not have it"
    except DAMAGE as error:
        yield table.name, "damaged_file", str(error).splitlines()[0]


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(table) as file:
        wanted = [name for name in ("key", "status", "url", "error_message") if name in file.schema_arrow.names]
        for batch in file.iter_batches(_ROWS, columns=wanted):
            yield from pylist(batch)


class FilesReader(FolderReader):
    """img2dataset's "files" layout. A second part lists the images that could not be downloaded."""

    format = "img2dataset"

    def total(self) -> int:
        return super().total() + sum(1 for _ in self._failed())

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        if part == 0:
            yield from super().read(0, skip)
            skip = 0
        for index, (url, reason, message) in enumerate(self._failed()):
            if index >= skip:
                yield Found(1, index, url, None, reason, message)

    def _failed(self) -> Iterator[tuple[str, str, str]]:
        for table in sorted(self._root.glob("*.parquet")):
            yield from failures(table, None)

    def _url(self, meta: dict[str, Any]) -> str | None:
        url = meta.get("origin", {}).get("url")
        return url if isinstance(url, str) else None
