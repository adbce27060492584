"""The folder in which an import keeps its finished work; it lies beside data/ and has a subfolder for each piece.

A piece is a run of samples: a shard for each split, and their tables. It is renamed into place as a whole. Then a small
database stores where the next piece begins in the source, and which pictures have been seen. So a kill loses only the
unfinished piece, and the next process continues and writes the same bytes.
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
    """The unfinished piece: shard `number` of each split."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._shards: dict[Split, ShardWriter] = {split: ShardWriter(folder / split, number) for split in SPLITS}
        self._contents: dict[Split, list[str | None]] = {split: [] for split in SPLITS}
        self.tally = Tally()
        self.images = 0  # samples with an image in the source, dropped or not

    def add(self, sample: Prepared, split: Split) -> None:
        """Append a sample to its split. A dropped sample gets a row in the training table."""
        self.tally.add(sample)
        self.images += sample.place.load is not None
        self._shards[split].add(sample.record)
        self._contents[split].append(sample.content)

    def finish(self) -> None:
        """Close the shards and write what the last step of the import needs to know about them."""
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
        folder: it is made if it does not exist.
        inputs: everything that decides the bytes.
        restart: discard the work of another import, or of an earlier state of the source.

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
        for left in folder.glob(".[0-9]*"):  # an unfinished piece of a process that was killed
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
        """The number of the next piece, and the part and the sample of the source where it begins."""
        row = self._database.execute("SELECT number, part, skip FROM pieces ORDER BY number DESC LIMIT 1").fetchone()
        return (0, 0, 0) if row is None else (row[0] + 1, row[1], row[2])

    def first_with(self, content: str, url: str) -> str | None:
        """The first sample with these pixels. If there is none, store this one as the first and return None."""
        key = bytes.fromhex(content)[:16]
        row = self._database.execute("SELECT url FROM seen WHERE content = ?", (key,)).fetchone()
        if row is None:
            self._database.execute("INSERT INTO seen VALUES (?, ?)", (key, url))
            return None
        return str(row[0])

    @contextmanager
    def piece(self, number: int) -> Iterator[Piece]:
        """A new piece. It is put in place when the block ends; `commit` must follow."""
        with files.atomic_folder(self._folder / f"{number:05d}") as folder:
            piece = Piece(folder, number)
            yield piece
            piece.finish()

    def commit(self, number: int, part: int, skip: int) -> None:
        """Store that piece `number` is finished and that the next one begins at sample `skip` of part `part`."""
        self._database.execute("INSERT INTO pieces VALUES (?, ?, ?)", (number, part, skip))
        self._database.commit()

    def pieces(self) -> list[int]:
        """The numbers of the finished pieces."""
        return [row[0] for row in self._database.execute("SELECT number FROM pieces ORDER BY number")]

    def tally(self) -> Tally:
        """The counts of all samples so far."""
        total = Tally()
        for number in self.pieces():
            value = files.read_json(self._folder / f"{number:05d}" / "piece.json")
            total.extend(Tally.from_json(value["tally"]))
        return total

    def shard(self, number: int, split: Split) -> tuple[Path, ShardEntry | None, Path]:
        """The tar of a split of a piece, its entry in the manifest (None: no sample), and its table."""
        folder = self._folder / f"{number:05d}"
        entry = files.read_json(folder / "piece.json")["shards"][split]
        parsed = None if entry is None else ShardEntry.model_validate(entry)
        return folder / split / f"{number:05d}.tar", parsed, folder / f"{split}.parquet"

    def contents(self, split: Split) -> Iterator[str]:
        """The pixel hashes of all samples of a split."""
        for number in self.pieces():
            column = pq.read_table(self.shard(number, split)[2], columns=["content"])["content"]
            yield from (one for one in column.to_pylist() if one is not None)

    def records(self, split: Split) -> Iterator[tuple[str | None, Record]]:
        """All records of a split in their order, with their pixel hashes; memory holds one record."""
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
