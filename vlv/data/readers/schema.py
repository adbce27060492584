"""Which column of a table holds the images and which the captions, and the rows of a batch as plain data."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlv.data.readers import captions
from vlv.data.readers.formats import NONE
from vlv.data.shards import DataError

# Names of columns with images (`_IMAGES`) or with names of image files (`PATHS`), in the order in which we look.
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "pixel_values")
PATHS = (
    "file_name", "filename", "image_file_name", "image_path", "img_path", "image_file", "image_name", "image", "img",
    "path", "filepath", "file_path", "file",
)  # fmt: skip


def pylist(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. In text that is not UTF-8, bad bytes become lone surrogates; other rows are not affected."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type
        if _is_text(kind):
            texts = column.cast(pa.large_binary()).to_pylist()
            columns[name] = [None if one is None else one.decode("utf-8", "surrogateescape") for one in texts]
        elif _is_list(kind) and _is_text(kind.value_type):
            lists = column.cast(pa.large_list(pa.large_binary())).to_pylist()
            columns[name] = [None if one is None else [_decoded(text) for text in one] for one in lists]
        else:
            columns[name] = column.to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _decoded(text: bytes | None) -> str:
    return "" if text is None else text.decode("utf-8", "surrogateescape")


def listed_names(names: Iterable[str] | Mapping[str, Any]) -> str:
    """The names of the columns, for an error."""
    return "It has: " + ", ".join(names)


def image_column(schema: pa.Schema, asked: str | None, root: Path) -> str:
    """The column of the images, or of the names of their files: the one that was asked for, or a guess.

    Raises:
        DataError: the column cannot be used, or cannot be guessed; the message lists the columns.
    """
    able: list[str] = [field.name for field in schema if _holds_images(field.type)]
    texts: list[str] = [field.name for field in schema if _is_text(field.type)]
    if asked is not None:
        if asked not in [*able, *texts]:
            raise DataError(f"{root}: column {asked!r} holds neither images nor names of files. {_listed(schema)}")
        return asked
    named = [name for wanted in _IMAGES for name in able if name.lower() == wanted]
    if not named and not able:
        able = [name for wanted in PATHS for name in texts if name.lower() == wanted][:1]
    if not named and len(able) != 1:
        raise DataError(
            f"{root}: cannot tell which column holds the images; name it: --image-column. {_listed(schema)}"
        )
    return (named or able)[0]


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def caption_column(schema: pa.Schema, asked: str | None, root: Path, image: str) -> str | None:
    """The column of the captions: the one that was asked for, or a guess; None if `asked` says that there are none.

    Raises:
        DataError: the column cannot be used, or cannot be guessed; the message lists the columns.
    """
    if asked == NONE:
        return None
    able: list[str] = [field.name for field in schema if field.name != image and _holds_captions(field.type)]
    if asked is not None:
        if asked not in able:
            raise DataError(f"{root}: column {asked!r} holds no text. {_listed(schema)}")
        return asked
    named = [name for wanted in captions.NAMES for name in able if name.lower() == wanted]
    if not named:
        raise DataError(
            f"{root}: cannot tell which column holds the captions; name it: --caption-column NAME, or "
            f"--caption-column {NONE}. {_listed(schema)}"
        )
    return named[0]


def _holds_captions(kind: pa.DataType) -> bool:
    """Whether a column holds text, lists of texts, or conversations of LLaVA (lists of structs of from and value)."""
    if not _is_list(kind):
        return _is_text(kind)
    inner = kind.value_type
    if pa.types.is_struct(inner):
        return {"from", "value"} <= {inner.field(i).name for i in range(inner.num_fields)}
    return _is_text(inner)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _listed(schema: pa.Schema) -> str:
    return listed_names(f"{field.name} ({field.type})" for field in schema)
