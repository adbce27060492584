"""Where an import keeps what it has done: a folder beside data/, one subfolder for each finished run of samples.

A run ("piece") has a shard for each split and their tables, and is renamed into place as a whole; then a small
database learns where in the source the next one begins and which pictures have been seen. So a kill costs the
piece in work, and the next process goes on to the same bytes.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data import shards
from vlv.data.import_.recipe import SPLITS, Prepared, Tally
from vlv.data.readers.found import Split
from vlv.data.shards import DataError, ShardEntry
from vlv.data.writer import TABLE_SCHEMA, WRITTEN, Record, ShardWriter
from vlv.io import files


class Piece:
    """The piece in work: shard `number` of each split."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._shards: dict[Split, ShardWriter] = {split: ShardWriter(folder / split, number) for split in SPLITS}
        self._contents: dict[Split, list[str | None]] = {split: [] for split in SPLITS}
        self.tally = Tally()
        self.images = 0  # samples of which the source has an image, dropped or not

    def add(self, sample: Prepared, split: Split) -> None:
        """Append a sample to its split; a dropped one leaves a row in the training table."""
        self.tally.add(sample)
        self.images += sample.place.load is not None
        self._shards[split].add(sample.record)
        self._contents[split].append(sample.content)

    def finish(self) -> None:
        """Close the shards and write what the last step needs to know of them."""
        entries: dict[str, Any] = {}
        for split, shard in self._shards.items():
            entry = shard.finish()
            entries[split] = None if entry is None else entry.model_dump()
            table = pa.Table.from_pylist(shard.rows, TABLE_SCHEMA)
            contents = pa.array(self._contents[split], pa.string())
            pq.write_table(table.append_column("content", contents), self._folder / f"{split}.parquet")
        files.write_json(self._folder / "piece.json", {"shards": entries, "tally": self.tally.to_json()})


class Staging:
    """The staging folder of one import.

    Args:
        folder: made if it is not there.
        inputs: everything that decides the bytes.
        restart: discard what another import, or an earlier state of the source, has left.

    Raises:
        DataError: it holds an unfinished import of other inputs.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], *, restart: bool) -> None:
        self._folder = folder
        marker = folder / "import.json"
        before = files.read_json(marker) if marker.exists() else None
        if restart or before is None:
            for path in folder.glob("*"):
                if path.name not in {".lock", ".lock.holder", "scratch"}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            files.write_json(marker, inputs)
        elif before != inputs:
            changed = sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key))
            raise DataError(
                f"{folder} holds an unfinished import that differs in: {', '.join(changed)}. Finish it with the "
                "command it was started with, or discard it: --restart"
            )
        for left in folder.glob(".[0-9]*"):  # a piece in work when a process was killed
            shutil.rmtree(left)
        self._database = sqlite3.connect(folder / "journal.sqlite")
        self._database.executescript(
            "CREATE TABLE IF NOT EXISTS pieces (number INTEGER PRIMARY KEY, part INTEGER, skip INTEGER);"
            "CREATE TABLE IF NOT EXISTS seen (content BLOB PRIMARY KEY, url TEXT) WITHOUT ROWID;"
        )

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def resume(self) -> tuple[int, int, int]:
        """Number of the next piece, and part and sample of the source where it begins."""
        row = self._database.execute("SELECT number, part, skip FROM pieces ORDER BY number DESC LIMIT 1").fetchone()
        return (0, 0, 0) if row is None else (row[0] + 1, row[1], row[2])

    def first_with(self, content: str, url: str) -> str | None:
        """The first sample with these pixels, if there was one; otherwise this one is it from now on."""
        key = bytes.fromhex(content)[:16]
        row = self._database.execute("SELECT url FROM seen WHERE content = ?", (key,)).fetchone()
        if row is None:
            self._database.execute("INSERT INTO seen VALUES (?, ?)", (key, url))
            return None
        return str(row[0])

    @contextmanager
    def piece(self, number: int) -> Iterator[Piece]:
        """A new piece, in place when the block ends; `commit` must follow."""
        with files.atomic_folder(self._folder / f"{number:05d}") as folder:
            piece = Piece(folder, number)
            yield piece
            piece.finish()

    def commit(self, number: int, part: int, skip: int) -> None:
        """Piece `number` is done; the next begins at sample `skip` of part `part`."""
        self._database.execute("INSERT INTO pieces VALUES (?, ?, ?)", (number, part, skip))
        self._database.commit()

    def pieces(self) -> list[int]:
        """Numbers of the pieces that are done."""
        return [row[0] for row in self._database.execute("SELECT number FROM pieces ORDER BY number")]

    def tally(self) -> Tally:
        """What became of all samples so far."""
        total = Tally()
        for number in self.pieces():
            value = files.read_json(self._folder / f"{number:05d}" / "piece.json")
            total.extend(Tally.from_json(value["tally"]))
        return total

    def shard(self, number: int, split: Split) -> tuple[Path, ShardEntry | None, Path]:
        """Tar of a piece's split, its entry (None: there is no sample), and its table."""
        folder = self._folder / f"{number:05d}"
        entry = files.read_json(folder / "piece.json")["shards"][split]
        parsed = None if entry is None else ShardEntry.model_validate(entry)
        return folder / split / f"{number:05d}.tar", parsed, folder / f"{split}.parquet"

    def contents(self, split: Split) -> Iterator[str]:
        """The hashes of the pixels of all samples of a split."""
        for number in self.pieces():
            column = pq.read_table(self.shard(number, split)[2], columns=["content"])["content"]
            yield from (one for one in column.to_pylist() if one is not None)

    def records(self, split: Split) -> Iterator[tuple[str | None, Record]]:
        """All records of a split as they were added, one in memory, with the hash of their pixels."""
        for number in self.pieces():
            tar, entry, table = self.shard(number, split)
            samples = shards.scan_shard(tar) if entry is not None else iter(())
            for row in pq.read_table(table).to_pylist():
                content, key = row.pop("content"), row.pop("key")
                fields = {name: value for name, value in row.items() if name not in ("shard", "sha256")}
                if key is None:
                    yield content, Record(**fields)
                    continue
                sample = next(samples)
                meta = {name: value for name, value in sample.meta.items() if name not in WRITTEN}
                yield content, Record(**fields, image=sample.image, extension=sample.extension, meta=meta)
