"""Parquet files with images and captions: a Hugging Face set, img2dataset's "parquet" output, one's own."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers.columns import ColumnsReader

_ROWS = 16  # decoded from a row group at a time


class ParquetReader(ColumnsReader):
    """All parquet files below `root` (or one file); a part is a row group. Memory holds what Arrow needs of one."""

    format = "parquet"

    def _find(self, root: Path) -> list[Path]:
        return [path for path in root.rglob("*.parquet") if path.is_file()]

    def _measure(self, path: Path) -> tuple[pa.Schema, int, int]:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.num_row_groups, file.metadata.num_rows

    def _batches(self, path: Path, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(_ROWS, row_groups=[part], columns=columns)
