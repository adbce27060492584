"""Reads images that a file lists with their captions. COCO, tables, LLaVA and imagefolder share this reader."""

import functools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from vlv.data.readers import captions
from vlv.data.readers.formats import ReadOptions, Rule
from vlv.data.readers.found import Content, Found, database, files_hash, locate, rank
from vlv.data.shards import DataError
from vlv.io import files

logger = logging.getLogger(__name__)

_TRIED = 50  # names that decide which folder of images is used


@dataclass(frozen=True)
class Entry:
    """A line of a list.

    Attributes:
        name: of the image, relative to the folder of images; the name of the line if it names no image.
        caption: a text or a list of texts.
        caption_problem: reason and message, if there is no caption that can be used.
        meta: for the JSON of the sample.
        fault: reason and message, if the line names no image.
        listed: False for an image that was found in the folder and is in no list.
    """

    name: str
    caption: str | list[str] | None = None
    caption_problem: tuple[str, str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None
    listed: bool = True


class ListedReader:
    """Entries in an order that is shuffled by `seed`. Entries of the same image are one sample with several captions.

    A database below `scratch` keeps them, so that memory does not grow with them.

    Args:
        format: the name of the format.
        tables: the files with the lists, for `files_hash`.
        entries: the lines of the lists.
        folders: where the images may be. The folder that has most of the first names is used.
    """

    def __init__(
        self,
        format: str,
        tables: Sequence[Path],
        entries: Iterable[Entry],
        folders: Sequence[Path],
        scratch: Path,
        seed: int,
        rule: Rule,
    ) -> None:
        self.format = format
        self._tables, self._seed, self._rule = tables, seed, rule
        columns = "rank BLOB, name BLOB, number INTEGER, entry TEXT, PRIMARY KEY (rank, name, number)"
        self._listing = database(scratch, "listing", f"entries ({columns}) WITHOUT ROWID")
        rows = (
            (rank(seed, entry.name), entry.name.encode("utf-8", "surrogatepass"), number, json.dumps(vars(entry)))
            for number, entry in enumerate(entries)
        )
        self._listing.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
        self._listing.commit()
        self._folder = self._choose(folders)

    def _choose(self, folders: Sequence[Path]) -> Path:
        names = [group[0].name for group in islice(self._groups(), _TRIED) if group[0].fault is None]
        hits = {folder: sum(isinstance(locate(folder, name), Path) for name in names) for folder in folders}
        best = max(folders, key=lambda folder: hits[folder])  # the first of equals
        if len(folders) > 1:
            logger.info("Images are taken from %s (if they are elsewhere: --images)", best)
        return best

    def _groups(self) -> Iterator[list[Entry]]:
        rows = self._listing.execute("SELECT name, entry FROM entries ORDER BY rank, name, number")
        for _, group in groupby(rows, key=lambda row: row[0]):
            yield [_entry(files.parse_json(text, "an entry")) for _, text in group]

    def total(self) -> int:
        return int(self._listing.execute("SELECT count(DISTINCT name) FROM entries").fetchone()[0])

    def files_hash(self) -> str:
        return files_hash(self._tables)

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        """One part: the images."""
        for index, group in enumerate(islice(self._groups(), skip, None), skip):
            name, fault = group[0].name, group[0].fault
            if fault is not None:
                yield Found(part, index, name, None, *fault)
                continue
            place = locate(self._folder, name)
            if isinstance(place, Path):
                yield Found(part, index, name, functools.partial(self._load, place, group))
            else:
                yield Found(part, index, name, None, *place)

    def _load(self, path: Path, group: list[Entry]) -> Content:
        image = path.read_bytes()
        group = [entry for entry in group if entry.listed] or group
        meta = group[0].meta
        said = [entry.caption for entry in group if entry.caption is not None]
        texts = [text for one in said for text in ([one] if isinstance(one, str) else one)]
        usable = [text for text in texts if text.strip()]
        if not usable:
            problem = ("caption_empty", "the caption is empty") if texts else group[0].caption_problem
            return Content(image, caption_problem=problem, meta=meta)
        try:
            caption, others = captions.pick(usable, self._rule, self._seed, group[0].name)
        except ValueError as error:
            return Content(image, caption_problem=("caption_unreadable", str(error)), meta=meta)
        return Content(image, caption, meta=meta | others)


def _entry(value: dict[str, Any]) -> Entry:
    """An entry from its JSON, which has lists for tuples."""
    pairs = {name: tuple(value[name]) for name in ("caption_problem", "fault") if value[name] is not None}
    return Entry(**value | pairs)


def open_listed(
    format: str,
    source: Path,
    tables: Sequence[Path],
    entries: Iterable[Entry],
    folders: Sequence[Path],
    scratch: Path,
    options: ReadOptions,
) -> ListedReader:
    """Make a `ListedReader` after a check that there are tables, and that the folders of images exist.

    Raises:
        DataError: there is no table, or a folder does not exist.
    """
    if not tables:
        raise DataError(
            f"{source} has no file that lists its images, as {format} has; name the file, or another --format"
        )
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise DataError(f"{missing} is not a folder. Say where the images are: --images FOLDER")
    return ListedReader(format, tables, entries, folders, scratch, options.seed, options.rule)
