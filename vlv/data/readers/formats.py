"""The formats of image sets: which module reads each of them, and which one a source looks like.

A new format is one module in this folder and one row in `FORMATS`. This file imports no reader until one is needed, so
the command line can list the names at once.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlv.data.shards import DataError

if TYPE_CHECKING:
    from vlv.data.readers.found import Reader

# Name of a format -> its module, in the order in which `guess` asks. The module has
#   open_reader(format, source, scratch, options) -> Reader
#   recognises(format, source, inside) -> bool, where `inside` is what `_inside` found below a folder
FORMATS = {
    "shards": "tars",
    "img2dataset": "tars",
    "arrow": "columns",
    "imagefolder": "tabular",
    "parquet": "columns",
    "coco": "coco",
    "llava": "tabular",
    "table": "tabular",
    "folder": "folder",
}
# Names of files that tell a format; found at any depth.
_TELLING = frozenset({"state.json", "metadata.csv", "metadata.jsonl", "metadata.parquet"})
_KNOWN_FILES = ".parquet, .arrow, .tar, .tar.gz, .tgz, .json, .jsonl, .ndjson, .csv, .tsv"

Rule = Literal["seeded", "first", "longest"]  # which of several captions
NONE = "none"  # as a caption column: there are no captions


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read. A format ignores the options that it does not know.

    Attributes:
        format: a name in `FORMATS`; None: guessed.
        images: the folder of images, for a format that names them; None: guessed.
        image_column, caption_column: of a format with columns; None: guessed. caption_column "none": there are no
            captions.
        rule: which of several captions of an image is taken.
        seed: decides the order of the source, and the caption where `rule` is "seeded".
    """

    format: str | None = None
    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    rule: Rule = "seeded"
    seed: int = 0


def open_source(source: Path, scratch: Path, options: ReadOptions) -> "Reader":
    """The reader of a source; it may keep a listing below `scratch`.

    Raises:
        DataError: no such path or format, or the source is not of this format.
    """
    chosen = options.format or guess(source)
    if chosen not in FORMATS:
        raise DataError(f"There is no format {chosen!r}; the formats are {', '.join(FORMATS)}")
    if not source.exists():
        raise DataError(f"There is no {source}")
    reader: Reader = _module(chosen).open_reader(chosen, source, scratch, options)
    return reader


def guess(source: Path) -> str:
    """The format by what the path is.

    Raises:
        DataError: no such path, or a file of no known format.
    """
    if not source.exists():
        raise DataError(f"There is no {source}")
    inside = _inside(source)
    for name in FORMATS:
        if _module(name).recognises(name, source, inside):
            return name
    raise DataError(
        f"{source} is neither a folder nor a file that ends in {_KNOWN_FILES}. "
        f"If it is one of {', '.join(FORMATS)}, say so: --format NAME"
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"vlv.data.readers.{FORMATS[name]}")


def _inside(source: Path) -> frozenset[str]:
    """The endings of all files below a folder, in lower case, and the names among `_TELLING`; nothing for a file."""
    from vlv.data.readers.found import walk

    found: set[str] = set()
    for _, names in walk(source) if source.is_dir() else ():
        for name in names:
            lower = name.lower()
            found.add(".tar.gz" if lower.endswith(".tar.gz") else Path(lower).suffix)
        found |= _TELLING & set(names)
    return frozenset(found)
