"""Images that a file lists with their captions: what COCO, tables, LLaVA and Hugging Face's imagefolder share."""

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

_TRIED = 50  # names by which the folder of images is chosen


@dataclass(frozen=True)
class Entry:
    """A line of a list.

    Attributes:
        name: of the image, relative to the folder of images; of the line itself where it names no image.
        caption: text or a list of texts.
        caption_problem: a reason and a message, where there is none that can be used.
        meta: for the sample's JSON.
        fault: a reason and a message, where the line names no image.
        listed: False for an image that was found, but that no list names.
    """

    name: str
    caption: str | list[str] | None = None
    caption_problem: tuple[str, str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None
    listed: bool = True


class ListedReader:
    """Entries in an order shuffled by `seed`; those of the same image are one sample with several captions.

    They are kept in a database below `scratch`, so that memory does not grow with them.

    Args:
        format: how the reader calls itself.
        tables: the files that list; for the fingerprint.
        entries: what they say.
        folders: where the images may lie; the one that has most of the first names is taken.
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
    """An entry from what it was stored as; JSON has lists for tuples."""
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
    """A `ListedReader`, once it is sure that there are tables and folders of images.

    Raises:
        DataError: there is none.
    """
    if not tables:
        raise DataError(
            f"{source} has no file that lists its images, as {format} has; name the file, or another --format"
        )
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise DataError(f"{missing} is not a folder. Say where the images are: --images FOLDER")
    return ListedReader(format, tables, entries, folders, scratch, options.seed, options.rule)
