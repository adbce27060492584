"""Captions made elsewhere (`vlv data caption`), found again by the hash of the image file they were made for."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers.scratch import database
from vlv.data.shards import DataError

_ROWS = 10_000


class CaptionTable:
    """The captions of a parquet file with columns `sha256` (hex, of the image file) and `caption`, on disk.

    Raises:
        DataError: not such a file.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        table = "captions (sha256 BLOB PRIMARY KEY, caption TEXT) WITHOUT ROWID"
        self._database = database(scratch, "captions", table)
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=["sha256", "caption"]):
                    rows = ((bytes.fromhex(row["sha256"]), row["caption"]) for row in batch.to_pylist())
                    self._database.executemany("INSERT OR REPLACE INTO captions VALUES (?, ?)", rows)
            self._database.commit()
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path} is no table of captions with columns sha256 and caption ({reason}). "
                "`vlv data caption` writes one: captions.parquet"
            ) from error

    def find(self, sha256: str) -> str | None:
        """The caption of an image file, if there is one."""
        key = bytes.fromhex(sha256)
        row = self._database.execute("SELECT caption FROM captions WHERE sha256 = ?", (key,)).fetchone()
        return None if row is None else str(row[0])
