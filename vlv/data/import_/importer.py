"""`import_images` turns a set of images into data/."""

import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data import writer
from vlv.data.import_ import recipe as recipes
from vlv.data.import_.recipe import SPLITS, Note, Prepared, Recipe, Shares, Tally
from vlv.data.import_.staging import Staging
from vlv.data.readers.folder import FolderReader
from vlv.data.readers.formats import NONE, ReadOptions, open_source
from vlv.data.readers.found import Found, Reader, Split, database
from vlv.data.shards import TABLE, DataError, Manifest, ShardEntry, SplitEntry
from vlv.data.writer import Record
from vlv.io import files
from vlv.io.progress import meter

logger = logging.getLogger(__name__)

# A piece ends after shard_size images, or after this many times as many rows: rows of failed downloads are in memory.
_ROWS_PER_IMAGE = 4


@dataclass(frozen=True)
class Wanted:
    """An import. `captions`: a table of `vlv data caption`, which has priority over the captions of the source."""

    recipe: Recipe
    shard_size: int
    shares: Shares = field(default_factory=Shares)
    reading: ReadOptions = field(default_factory=ReadOptions)
    captions: Path | None = None
    description: str | None = None


@dataclass(frozen=True)
class ImportReport:
    """The result of an import."""

    manifest: Manifest
    tally: Tally

    @property
    def notes(self) -> list[Note]:
        return self.tally.notes

    def counts(self) -> dict[str, int]:
        """How many samples were found and kept, and how many were dropped or lost their caption, by reason."""
        return {"found": self.tally.found, **self.tally.counts()}


def import_images(
    source: Path, data: Path, wanted: Wanted, *, workers: int | None = None, restart: bool = False
) -> ImportReport:
    """Replace `data` with the images of `source`. Equal sources give equal bytes, also after a kill.

    A dropped sample has a row in the training table with the reason as its status: a reason of the reader or of
    vlv.data.import_.recipe, or `duplicate` (the same pixels after the cut). Memory holds a few images for each of the
    `workers` threads (default: one for each processor) and the table rows of one shard, whatever the size of the
    source. Work in progress lies beside `data`, in `.import.NAME`.

    Raises:
        DataError: the source cannot be read, has no usable image, or overlaps with `data`; it holds captions and none
            was found; there is an unfinished import of something else.
        LockHeldError: another import of this data is running.
    """
    _check_apart(source, data)
    staging = data.parent / f".import.{data.name}"
    try:
        with files.folder_lock(staging, "vlv data import"):
            report = _Import(source, data, staging, wanted, workers, restart).run()
            shutil.rmtree(staging)
            return report
    finally:
        if staging.is_dir() and not (staging / "import.json").exists():  # nothing was begun
            shutil.rmtree(staging)


def _check_apart(source: Path, data: Path) -> None:
    inner, target = source.resolve(), data.resolve()
    if inner.is_relative_to(target) or target.is_relative_to(inner):
        raise DataError(f"{source} and {data} overlap. The import replaces {data}, so move the images elsewhere")


class _Import:
    def __init__(
        self, source: Path, data: Path, staging: Path, wanted: Wanted, workers: int | None, restart: bool
    ) -> None:
        self._source, self._data, self._staging, self._wanted = source, data, staging, wanted
        self._workers = workers or os.cpu_count() or 1
        scratch = staging / "scratch"
        self._reader: Reader = open_source(source, scratch, wanted.reading)
        self._captions = CaptionTable(wanted.captions, scratch) if wanted.captions is not None else None
        self._wants_captions = wanted.captions is None and wanted.reading.caption_column != NONE
        if self._wants_captions and isinstance(self._reader, FolderReader):
            self._reader.ask_for_captions()
        self._stage = Staging(staging, self._inputs(), restart=restart)

    def _inputs(self) -> dict[str, Any]:
        wanted, reading = self._wanted, self._wanted.reading
        return {
            "source": self._source.name,
            "files in it": self._reader.files_hash(),
            "format": self._reader.format,
            "recipe": asdict(wanted.recipe),
            "shard_size": wanted.shard_size,
            "splits": asdict(wanted.shares),
            "reading": [reading.image_column, reading.caption_column, reading.rule, reading.seed],
            "images": None if reading.images is None else reading.images.name,
            "captions": None if wanted.captions is None else files.sha256_file(wanted.captions),
        }

    def run(self) -> ImportReport:
        try:
            self._read_all()
            tally = self._stage.tally()
            problem = self._problem(tally)
            if problem is not None:
                shutil.rmtree(self._staging)
                raise DataError(f"{self._source}: {problem} {self._data} is unchanged.")
            return ImportReport(self._assemble(tally), tally)
        finally:
            self._stage.close()

    def _problem(self, tally: Tally) -> str | None:
        """Why the result cannot be what the user meant, and the remedy; None if it can."""
        if not tally.kept:
            lost = {"image_missing", "outside_folder"} & set(tally.dropped)
            remedy = " If the images are in another folder, name it: --images FOLDER." if lost else ""
            return f"none of {tally.found} images can be used {dict(tally.dropped) or ''}.{remedy}"
        # Captions that were there or may have been there.
        found = tally.captions_left_out + Counter(image_missing=tally.dropped["image_missing"])
        if self._wants_captions and found and not tally.captions:
            note = next(note for note in tally.notes if note.reason in found)
            return (
                f"{tally.kept} images, but not one caption that can be used {dict(found)}, such as {note.path}: "
                f"{note.message}. If they are in another column, name it: --caption-column NAME; if there are none, "
                f"say so: --caption-column {NONE}."
            )
        return None

    def _read_all(self) -> None:
        number, part, skip = self._stage.resume()
        if number:
            logger.info("Continuing after %d shards of an earlier run", number)
        with ThreadPoolExecutor(self._workers) as pool, meter("Importing", self._reader.total()) as progress:
            progress.skip(self._stage.tally().found if number else 0)
            found = self._reader.read(part, skip)
            try:
                for prepared in _pieces(_prepared(pool, found, self._wanted.recipe, 4 * self._workers)):
                    with self._stage.piece(number) as piece:
                        for sample in prepared:
                            kept, split = self._judge(sample)
                            piece.add(kept, split)
                            progress.advance()
                            if piece.images >= self._wanted.shard_size:
                                break
                            if piece.tally.found >= _ROWS_PER_IMAGE * self._wanted.shard_size:
                                break
                        last = sample.place
                    self._stage.commit(number, last.part, last.index + 1)
                    number += 1
            finally:
                pool.shutdown(cancel_futures=True)

    def _judge(self, sample: Prepared) -> tuple[Prepared, Split]:
        """The sample with its final caption, or dropped as a duplicate; and its split."""
        if sample.content is None:
            return sample, "train"
        first = self._stage.first_with(sample.content, sample.place.url)
        if first is not None:
            return recipes.drop(sample, "duplicate", f"same picture as {first}"), "train"
        if self._captions is not None and sample.source_sha256 is not None:
            caption = self._captions.find(sample.source_sha256)
            sample = sample if caption is None else recipes.with_caption(sample, caption)
        return sample, sample.split or self._wanted.shares.split_of(sample.content or "")

    def _assemble(self, tally: Tally) -> Manifest:
        """Join the pieces: the training shards as they are, the two small splits as full shards."""
        wanted = self._wanted
        about: dict[str, Any] = {
            "kind": "imported",
            "description": wanted.description or self._source.resolve().name,
            "format": self._reader.format,
            "image_size": wanted.recipe.image_size,
            "shard_size": wanted.shard_size,
            "encoding": wanted.recipe.encoding,
            "splits": asdict(wanted.shares),
            "counts": tally.counts(),
        }
        if wanted.recipe.resize != "bicubic":
            about["resize"] = wanted.recipe.resize
        moved = self._moved(tally)
        with files.atomic_folder(self._data) as folder:
            splits: dict[str, SplitEntry] = {}
            for split in SPLITS:
                if split == "train" and moved is None:
                    splits[split] = self._link(folder / split)
                else:
                    splits[split] = writer.write_split(folder / split, self._records(split, moved), wanted.shard_size)
            manifest = Manifest(source=about, splits=splits)
            writer.write_manifest(folder, manifest)
        return manifest

    def _link(self, folder: Path) -> SplitEntry:
        """Link the training shards of the pieces (or copy them, where links are impossible), and join their tables."""
        folder.mkdir()
        entries: list[ShardEntry] = []
        with writer.open_table(folder / TABLE) as table:
            for number in self._stage.pieces():
                tar, entry, rows = self._stage.shard(number, "train")
                table.write_table(pq.read_table(rows, columns=table.schema.names))
                if entry is not None:
                    entries.append(entry)
                    try:
                        os.link(tar, folder / tar.name)
                    except OSError:
                        shutil.copyfile(tar, folder / tar.name)
        samples = sum(entry.samples for entry in entries)
        return SplitEntry(samples=samples, shards=entries, table_sha256=files.sha256_file(folder / TABLE))

    def _moved(self, tally: Tally) -> dict[str, Split] | None:
        """The splits by pixel hash, if a wanted split has no image (in a small set only); otherwise None."""
        if self._reader.format == "shards":
            return None  # the source decides
        contents = self._stage.contents
        empty = [split for split in self._wanted.shares.wanted() if next(contents(split), None) is None]
        if not empty:
            return None
        logger.info(
            "%d images are so few that %s would stay empty: each split gets at least one image",
            tally.kept,
            " and ".join(sorted(empty)),
        )
        return self._wanted.shares.filled([content for split in SPLITS for content in contents(split)])

    def _records(self, split: Split, moved: dict[str, Split] | None) -> Iterator[Record]:
        """The records of a split. All failed records are in the training split."""
        for stored in [split] if moved is None else SPLITS:
            for content, record in self._stage.records(stored):
                if (split if moved is None else "train" if content is None else moved[content]) == split:
                    yield record


def _prepared(pool: ThreadPoolExecutor, found: Iterable[Found], recipe: Recipe, window: int) -> Iterator[Prepared]:
    """Samples that are prepared in parallel, in the order of the source. At most `window` are in memory."""
    waiting: deque[Future[Prepared]] = deque()
    for one in found:
        waiting.append(pool.submit(recipes.prepare, one, recipe))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pieces(samples: Iterator[Prepared]) -> Iterator[Iterator[Prepared]]:
    """Iterators over `samples`: each continues where the one before it stopped, until no sample is left."""
    for first in samples:
        yield chain([first], samples)


_ROWS = 10_000


class CaptionTable:
    """Captions that `vlv data caption` made, found by the hash of their image file. They are kept on disk.

    The parquet file has the columns `sha256` (hex, of the image file) and `caption`.

    Raises:
        DataError: the file is not such a table.
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
                f"{path} is not a table of captions with columns sha256 and caption ({reason}). "
                "`vlv data caption` writes one: captions.parquet"
            ) from error

    def find(self, sha256: str) -> str | None:
        """The caption of an image file, if there is one."""
        key = bytes.fromhex(sha256)
        row = self._database.execute("SELECT caption FROM captions WHERE sha256 = ?", (key,)).fetchone()
        return None if row is None else str(row[0])
