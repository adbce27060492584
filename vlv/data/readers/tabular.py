"""Reads tables of image names and captions: csv, tsv, JSON lines, JSON, parquet; and Hugging Face's imagefolder.

A JSON table is a list of objects (such as LLaVA's), or one object of image names and captions (the release's Stage 2).
"""

import csv
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers import captions
from vlv.data.readers.formats import NONE, ReadOptions
from vlv.data.readers.found import walk
from vlv.data.readers.listed import Entry, ListedReader, open_listed
from vlv.data.readers.schema import PATHS, listed_names, pylist
from vlv.data.shards import DataError
from vlv.io import files, images

logger = logging.getLogger(__name__)

LINES, SEPARATED = (".jsonl", ".ndjson"), (".csv", ".tsv")
ENDINGS = (".json", *LINES, *SEPARATED)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
_ROWS = 1024  # of parquet, at a time
_CELL = 1 << 24  # characters of a csv's cell


def recognises(format: str, source: Path, inside: frozenset[str]) -> bool:
    """Whether a source is of this format.

    imagefolder: images and metadata files; llava: a JSON file of conversations, or a folder with one; table: a file.
    """
    if format == "imagefolder":
        return not inside.isdisjoint(images.SUFFIXES) and not inside.isdisjoint(METADATA)
    if format == "llava":
        if source.is_dir():
            return len(_conversations(source)) == 1
        return source.suffix.lower() == ".json" and is_conversations(source)
    return source.is_file() and source.suffix.lower() in ENDINGS


def open_reader(format: str, source: Path, scratch: Path, options: ReadOptions) -> ListedReader:
    """The reader of a table, of LLaVA's JSON or of an imagefolder."""
    image, caption = options.image_column, options.caption_column
    folders = [options.images or source]
    if format == "imagefolder":
        found = metadata_files(source)
        listed = imagefolder_entries(source, found, image, caption)
        return open_listed(format, source, found, listed, folders, scratch, options)
    found = [source] if source.is_file() else _conversations(source)
    if options.images is None and found:
        beside = found[0].parent
        guesses = (beside, beside / "images", beside.parent, beside.parent / "images")
        folders = [path for path in guesses if path.is_dir()]
    listed = (entry for one in found for entry in entries(one, image, caption))
    return open_listed(format, source, found, listed, folders, scratch, options)


def _conversations(source: Path) -> list[Path]:
    """LLaVA's files in a folder."""
    return [path for path in sorted(source.glob("*.json")) if is_conversations(path)]


@dataclass(frozen=True)
class _Columns:
    image: str
    caption: str | None


def entries(table: Path, image: str | None, caption: str | None, prefix: str = "") -> Iterator[Entry]:
    """The lines of a table. A line that cannot be read is an entry with a fault.

    Args:
        image, caption: names of the columns; None: guessed.
        prefix: is put before the name of each image.

    Raises:
        DataError: the file is not a table, or the columns cannot be guessed; the message lists them.
    """
    columns: _Columns | None = None
    try:
        for where, row in _rows(table):
            if not isinstance(row, Mapping):
                yield Entry(prefix + where, fault=("unreadable", row))
                continue
            columns = columns or _choose(table, row, image, caption)
            yield _entry(table, where, row, columns, prefix)
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        reason = str(error).splitlines()[0] or type(error).__name__
        raise DataError(f"{table} cannot be read as a table of images and captions: {reason}") from error
    if columns is None:
        raise DataError(f"{table} names no image")


def is_conversations(path: Path) -> bool:
    """Whether a JSON file begins like LLaVA's. Only its beginning is read."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and b'"conversations"' in head


def _entry(table: Path, where: str, row: Mapping[str, Any], columns: _Columns, prefix: str) -> Entry:
    name = row.get(columns.image)
    if isinstance(name, Mapping):  # parquet in Hugging Face's form
        name = name.get("path")
    if not isinstance(name, str) or not name.strip():
        return Entry(prefix + where, fault=("image_missing", f"{columns.image} names no image"))
    said = None if columns.caption is None else row.get(columns.caption)
    problem = None if columns.caption is None else ("caption_missing", f"{table.name} has none")
    if isinstance(said, list) and said and isinstance(said[0], Mapping):
        try:
            said = captions.answer(said)
        except ValueError as error:
            said, problem = None, ("caption_unreadable", str(error))
    elif not (said is None or isinstance(said, str) or captions.is_list_of_texts(said)):
        said, problem = None, ("caption_unreadable", f"{columns.caption} holds neither text nor a list of texts")
    known = captions.facts({key: value for key, value in row.items() if key not in (columns.image, columns.caption)})
    path = PurePosixPath(name.strip().replace("\\", "/")).as_posix()
    return Entry(prefix + path, said, problem, {"origin": known} if known else {})


def _choose(table: Path, row: Mapping[str, Any], image: str | None, caption: str | None) -> _Columns:
    """The columns, guessed from the first row."""
    names = {name.strip().lower(): name for name in reversed(list(row))}
    for asked in (image, caption):
        if asked is not None and asked != NONE and asked not in row:
            raise DataError(f"{table} has no column {asked!r}. {listed_names(row)}")
    path = image or next((names[name] for name in PATHS if name in names), None)
    if path is None:
        raise DataError(
            f"{table}: cannot tell which column names the images; say so: --image-column. {listed_names(row)}"
        )
    said = caption or next((names[name] for name in captions.NAMES if name in names and names[name] != path), None)
    if said is None:
        raise DataError(
            f"{table}: cannot tell which column holds the captions; name it: --caption-column NAME, or "
            f"--caption-column {NONE}. {listed_names(row)}"
        )
    logger.info("%s: images by column %s, captions by column %s", table.name, path, said)
    return _Columns(path, None if said == NONE else said)


def _rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Each row, or the reason why it cannot be read, with its place."""
    ending = table.suffix.lower()
    if ending == ".parquet":
        return _of_parquet(table)
    if ending == ".json":
        return _of_json(table)
    return _of_lines(table) if ending in LINES else _of_separated(table)


def _of_lines(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    with table.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{table.name}:{number}"
            try:
                yield where, captions.parse_json(_text(line), "the line")
            except ValueError as error:
                yield where, str(error)


def _of_json(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    value = files.parse_json(_text(table.read_bytes()), "its JSON", "Correct it.")
    if isinstance(value, dict):
        value = [{"image": name, "caption": caption} for name, caption in value.items()]
    if not isinstance(value, list):
        raise ValueError("neither a list of objects nor an object of image names and captions")
    for number, row in enumerate(value, 1):
        yield f"{table.name}:{number}", row if isinstance(row, dict) else f"no JSON object ({type(row).__name__})"


def _of_separated(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    csv.field_size_limit(_CELL)
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header = stream.readline()
        # The separator is the candidate that the first line has most of.
        separator = "\t" if table.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
        lines = csv.reader(chain([header], stream), delimiter=separator)
        names = [name.strip() for name in next(lines, [])]
        for cells in lines:
            if not cells:
                continue
            where = f"{table.name}:{lines.line_num}"
            if len(cells) > len(names):
                yield where, f"{len(cells)} cells, but the first line has {len(names)}"
            else:
                yield where, dict(zip(names, cells, strict=False))


def _of_parquet(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    with pq.ParquetFile(table) as file:
        number = 0
        for batch in file.iter_batches(_ROWS):
            for row in pylist(batch):
                number += 1
                yield f"{table.name}:{number}", row


def _text(data: bytes) -> str:
    """Bytes decoded as UTF-8. Bad bytes become lone surrogates, which affect only their own line."""
    return data.decode("utf-8-sig", "surrogateescape")


# -- imagefolder: images, and a metadata file for the whole folder or for each subfolder ------------------------


def metadata_files(root: Path) -> list[Path]:
    """The metadata files of an imagefolder, at any depth."""
    return sorted(folder / name for folder, names in walk(root) for name in names if name in METADATA)


def imagefolder_entries(root: Path, found: list[Path], image: str | None, caption: str | None) -> Iterator[Entry]:
    """The lines of the metadata files, and the images that are in none of them. Names are relative to `root`.

    Raises:
        DataError: from `entries`.
    """
    for path in found:
        inside = path.parent.relative_to(root).as_posix()
        yield from entries(path, image, caption, "" if inside == "." else f"{inside}/")
    unnamed = ("caption_missing", f"{found[0].name} does not name it")
    for folder, names in walk(root):
        for name in names:
            if Path(name).suffix.lower() in images.SUFFIXES:
                yield Entry((folder / name).relative_to(root).as_posix(), None, unnamed, listed=False)
