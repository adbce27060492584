"""Parquet files with image bytes and captions: a Hugging Face set, img2dataset's "parquet" output, one's own."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv.data.readers import captions
from vlv.data.readers.found import Content, Found, rank, shuffled, stamp
from vlv.data.readers.names import Rule
from vlv.data.shards import DataError

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "pixel_values")
_CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt", "description", "recaption")
_ROWS = 16  # decoded from a row group at a time
NONE = "none"  # as a caption column: there are no captions


class ParquetReader:
    """All parquet files below `root` (or one file), row group by row group; a part is a row group.

    Files and row groups come in an order shuffled by `seed`, rows in theirs. Memory holds what Arrow needs of one
    row group.

    Raises:
        DataError: no parquet file, one that cannot be read, or columns that cannot be told; the message lists them.
    """

    format = "parquet"

    def __init__(self, root: Path, seed: int, rule: Rule, image: str | None = None, caption: str | None = None) -> None:
        self._root = root if root.is_dir() else root.parent
        self._seed, self._rule = seed, rule
        found = [path for path in root.rglob("*.parquet") if path.is_file()] if root.is_dir() else [root]
        self._files = shuffled(found, self._root, seed)
        if not self._files:
            raise DataError(f"{root} has no parquet file")
        self._parts: list[tuple[Path, int]] = []
        self._total = 0
        self._schema = self._survey()
        self._image = _image_column(self._schema, image, root)
        self._caption = _caption_column(self._schema, caption, root)
        names = {name.lower(): name for name in self._schema.names}
        beside = [names[name] for name in ("url", "status", "error_message") if name in names]
        chosen = [self._image, self._caption, *beside]
        self._columns = list(dict.fromkeys(name for name in chosen if name is not None))

    def _survey(self) -> pa.Schema:
        """Count rows and row groups; the schema of the first file, which all must share."""
        schema: pa.Schema | None = None
        for path in self._files:
            try:
                with pq.ParquetFile(path) as file:
                    self._parts += [(path, group) for group in range(file.num_row_groups)]
                    self._total += file.metadata.num_rows
                    found = file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
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

    def fingerprint(self) -> str:
        return stamp(self._files)

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        for number, (path, group) in enumerate(self._parts[part:], part):
            index = -1
            try:
                for index, row in enumerate(self._rows(path, group)):
                    if number > part or index >= skip:
                        yield self._found(number, index, f"{self._name(path)}#{group}/{index}", row)
            except (pa.ArrowException, OSError) as error:
                name, message = f"{self._name(path)}#{group}", str(error).splitlines()[0]
                yield Found(number, index + 1, name, None, "damaged_file", message)

    def _rows(self, path: Path, group: int) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=self._columns):
                yield from batch.to_pylist()

    def _found(self, number: int, index: int, place: str, row: dict[str, Any]) -> Found:
        value = row[self._image]
        image = value.get("bytes") if isinstance(value, dict) else value
        if image is None:
            status = row.get("status")
            if isinstance(status, str) and status != "success":  # img2dataset's own parquet output
                return Found(number, index, place, None, status, str(row.get("error_message") or "no reason given"))
            path = value.get("path") if isinstance(value, dict) else None
            message = f"column {self._image} holds no bytes" + (f", only the path {path}" if path else "")
            return Found(number, index, place, None, "image_missing", message)
        url = next((one for name in ("url", "URL") if isinstance(one := row.get(name), str)), None)
        caption = row[self._caption] if self._caption is not None else None
        return Found(number, index, place, functools.partial(self._load, image, caption, url, place))

    def _load(self, image: bytes, value: Any, url: str | None, place: str) -> Content:
        caption, others = captions.pick(value, self._rule, self._seed, place)
        if caption is not None and not caption.strip():
            return Content(image, None, ("caption_empty", f"column {self._caption} is empty"), url, others)
        return Content(image, caption, None, url, others)


def _image_column(schema: pa.Schema, asked: str | None, root: Path) -> str:
    able: list[str] = [field.name for field in schema if _holds_images(field.type)]
    if asked is not None:
        if asked not in able:
            raise DataError(f"{root}: column {asked!r} holds no image bytes. {_listed(schema)}")
        return asked
    named = [name for wanted in _IMAGE_NAMES for name in able if name.lower() == wanted]
    if not named and len(able) != 1:
        raise DataError(
            f"{root}: cannot tell which column holds the images; name it: --image-column. {_listed(schema)}"
        )
    return (named or able)[0]


def _holds_images(kind: pa.DataType) -> bool:
    """Bytes, or Hugging Face's form: a struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _caption_column(schema: pa.Schema, asked: str | None, root: Path) -> str | None:
    if asked == NONE:
        return None
    able: list[str] = [field.name for field in schema if _holds_text(field.type)]
    if asked is not None:
        if asked not in able:
            raise DataError(f"{root}: column {asked!r} holds no text. {_listed(schema)}")
        return asked
    named = [name for wanted in _CAPTION_NAMES for name in able if name.lower() == wanted]
    if not named:
        raise DataError(
            f"{root}: cannot tell which column holds the captions; name it: --caption-column NAME, or "
            f"--caption-column {NONE}. {_listed(schema)}"
        )
    return named[0]


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _listed(schema: pa.Schema) -> str:
    return "It has: " + ", ".join(f"{field.name} ({field.type})" for field in schema)
