"""Reads images from the columns of parquet or arrow files."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers import captions
from vlv.data.readers.formats import NONE, ReadOptions, Rule
from vlv.data.readers.found import Content, Found, files_hash, locate, rank, shuffled
from vlv.data.readers.schema import caption_column, image_column, pylist
from vlv.data.shards import DataError
from vlv.io import files
from vlv.io.images import SUFFIXES

logger = logging.getLogger(__name__)

DAMAGE = (pa.ArrowException, OSError, ValueError)
_STATE = "state.json"  # in each folder of arrow files; lists them
_ROWS = 16  # decoded at a time


def recognises(format: str, source: Path, inside: frozenset[str]) -> bool:
    """A file by its ending; a folder with such files and no images, or with arrow files and their state.json."""
    if source.is_file():
        return source.suffix.lower() == f".{format}"
    with_images = not inside.isdisjoint(SUFFIXES)
    return f".{format}" in inside and (not with_images or (format == "arrow" and _STATE in inside))


def open_reader(format: str, source: Path, scratch: Path, options: ReadOptions) -> "ColumnsReader":
    """The reader of parquet or arrow files."""
    kind = ParquetReader if format == "parquet" else ArrowReader
    return kind(source, options.seed, options.rule, options.image_column, options.caption_column, options.images)


class ColumnsReader(ABC):
    """Files with columns, part by part. A subclass knows how a file is divided into parts.

    The order of files and parts is shuffled by `seed`; rows keep their order. Images are bytes, Hugging Face's struct
    of bytes and path, or names of files in `images` (None: the folder of the set).

    Raises:
        DataError: there is no such file, a file cannot be read, or the columns of images and captions cannot be
            guessed; the message lists the columns.
    """

    format: str

    def __init__(
        self,
        root: Path,
        seed: int,
        rule: Rule,
        image: str | None = None,
        caption: str | None = None,
        images: Path | None = None,
    ) -> None:
        self._root = root if root.is_dir() else root.parent
        self._images = images or self._root
        self._seed, self._rule = seed, rule
        self._files = shuffled(self._find(root) if root.is_dir() else [root], self._root, seed)
        if not self._files:
            raise DataError(f"{root} has no {self.format} file")
        self._parts: list[tuple[Path, int]] = []
        self._total = 0
        schema = self._survey()
        self._image = image_column(schema, image, root)
        self._caption = caption_column(schema, caption, root, self._image)
        logger.info("%s: images from column %s, captions from column %s", root.name, self._image, self._caption or NONE)
        names = {name.lower(): name for name in schema.names}
        beside = [names[name] for name in ("url", "status", "error_message") if name in names]
        chosen = [self._image, self._caption, *beside]
        self._columns = list(dict.fromkeys(name for name in chosen if name is not None))

    @abstractmethod
    def _find(self, root: Path) -> list[Path]:
        """The files in a folder."""

    @abstractmethod
    def _measure(self, path: Path) -> tuple[pa.Schema, int, int]:
        """A file's schema, its number of parts and its number of rows; raises one of `DAMAGE`."""

    @abstractmethod
    def _batches(self, path: Path, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a part, a few at a time; raises one of `DAMAGE`."""

    def _survey(self) -> pa.Schema:
        """Count rows and parts. Returns the schema of the first file, which all files must have."""
        schema: pa.Schema | None = None
        for path in self._files:
            try:
                found, parts, rows = self._measure(path)
            except DAMAGE as error:
                raise DataError(f"{path} cannot be read as {self.format}: {_first_line(error)}") from error
            self._parts += [(path, part) for part in range(parts)]
            self._total += rows
            schema = found if schema is None else schema
            if set(found.names) != set(schema.names):
                raise DataError(
                    f"{path} has the columns {', '.join(found.names)}, but {self._files[0].name} has "
                    f"{', '.join(schema.names)}. Import sets of one form at a time."
                )
        self._parts.sort(key=lambda part: rank(self._seed, f"{self._name(part[0])}#{part[1]}"))
        assert schema is not None
        return schema

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def total(self) -> int:
        return self._total

    def files_hash(self) -> str:
        return files_hash(self._files)

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        for number, (path, group) in enumerate(self._parts[part:], part):
            index = -1
            try:
                rows = (row for batch in self._batches(path, group, self._columns) for row in pylist(batch))
                for index, row in enumerate(rows):
                    if number > part or index >= skip:
                        yield self._found(number, index, f"{self._name(path)}#{group}/{index}", row)
            except DAMAGE as error:
                yield Found(number, index + 1, f"{self._name(path)}#{group}", None, "damaged_file", _first_line(error))

    def _found(self, number: int, index: int, place: str, row: dict[str, Any]) -> Found:
        value = row[self._image]
        image, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(image, str):
            image, name = None, image
        if image is None:
            status = row.get("status")
            if isinstance(status, str) and status != "success":  # img2dataset's own parquet output
                return Found(number, index, place, None, status, str(row.get("error_message") or "no reason given"))
            if not isinstance(name, str):
                return Found(number, index, place, None, "image_missing", f"column {self._image} holds no image")
            image = locate(self._images, name)
            if isinstance(image, tuple):
                reason, message = image
                return Found(number, index, place, None, reason, f"column {self._image} says {name}; {message}")
        url = next((one for key in ("url", "URL") if isinstance(one := row.get(key), str)), name)
        caption = row[self._caption] if self._caption is not None else None
        return Found(number, index, place, functools.partial(self._load, image, caption, url, place))

    def _load(self, image: bytes | Path, value: Any, url: str | None, place: str) -> Content:
        data = image.read_bytes() if isinstance(image, Path) else image
        try:
            caption, others = captions.pick(value, self._rule, self._seed, place)
        except ValueError as error:
            return Content(data, None, ("caption_unreadable", str(error)), url)
        if self._caption is not None and caption is None:
            return Content(data, None, ("caption_missing", f"column {self._caption} has none"), url)
        if caption is not None and not caption.strip():
            return Content(data, None, ("caption_empty", f"column {self._caption} is empty"), url, others)
        return Content(data, caption, None, url, others)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class ArrowReader(ColumnsReader):
    """All saved sets below `root` (a DatasetDict has one for each split), or one arrow file; a part is a file.

    Files are mapped into memory, not read. The package `datasets` is not needed.
    """

    format = "arrow"

    def _find(self, root: Path) -> list[Path]:
        """Those that a state.json lists (a `map` may have left others beside them), else all."""
        states = sorted(root.rglob(_STATE))
        if not states:
            return [path for path in root.rglob("*.arrow") if path.is_file()]
        return [path for state in states for path in _saved(state)]

    def _measure(self, path: Path) -> tuple[pa.Schema, int, int]:
        with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
            rows = 0
            try:
                for batch in reader:
                    rows += batch.num_rows
            except (pa.ArrowException, OSError):
                pass  # `read` names the damage, after the rows before it
            return reader.schema, 1, rows

    def _batches(self, path: Path, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
            for batch in reader:
                chosen = batch.select(columns)
                for begin in range(0, batch.num_rows, _ROWS):
                    yield chosen.slice(begin, _ROWS)


def _saved(state: Path) -> list[Path]:
    try:
        names = [str(one["filename"]) for one in files.read_json(state, "Correct it.")["_data_files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{state} is not what save_to_disk writes ({error}); name one arrow file") from error
    found = [state.parent / Path(name).name for name in names]
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing} is missing, but {state} lists it")
    return found


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
