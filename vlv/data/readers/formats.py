"""Which format a source has, and the reader for it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vlv.data.readers import coco
from vlv.data.readers.coco import CocoReader
from vlv.data.readers.folder import FilesReader, FolderReader
from vlv.data.readers.found import IMAGES, Reader
from vlv.data.readers.img2dataset import is_table
from vlv.data.readers.names import Format, Rule
from vlv.data.readers.parquet import ParquetReader
from vlv.data.readers.tars import TarReader
from vlv.data.shards import MANIFEST, DataError

FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read; what a format does not know it ignores.

    `format` None: guessed. `images` is COCO's folder of images, `image_column` and `caption_column` are parquet's
    (None: guessed; caption_column "none": no captions), `rule` chooses one of several captions, `seed` decides it
    and the order of the source.
    """

    format: Format | None = None
    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    rule: Rule = "seeded"
    seed: int = 0


def open_source(source: Path, scratch: Path, options: ReadOptions) -> Reader:
    """The reader of a source; it may keep a listing below `scratch`.

    Raises:
        DataError: no such path, or not of this format.
    """
    chosen = options.format or guess(source)
    if not source.exists():
        raise DataError(f"There is no {source}")
    seed, rule = options.seed, options.rule
    if chosen == "coco":
        return CocoReader(source, options.images, seed, rule)
    if chosen == "parquet":
        return ParquetReader(source, seed, rule, options.image_column, options.caption_column)
    if chosen == "shards" or (chosen == "img2dataset" and (source.is_file() or _first(source, ".tar"))):
        return TarReader(source, seed, rule, ours=chosen == "shards")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    return (FilesReader if chosen == "img2dataset" else FolderReader)(source, scratch, seed, rule)


def guess(source: Path) -> Format:
    """The format by what the path is.

    Raises:
        DataError: no such path, or a file of no format that is known.
    """
    if source.is_dir():
        return _guess_folder(source)
    if not source.exists():
        raise DataError(f"There is no {source}")
    ending = source.suffix.lower()
    if ending == ".parquet":
        return "parquet"
    if ending == ".tar":
        return "img2dataset"
    if ending == ".json" and coco.is_annotations(source):
        return "coco"
    raise DataError(
        f"{source} is not a folder, and neither a .parquet, a .tar nor a COCO annotations file (.json). "
        f"If it is one of {', '.join(FORMATS)}, say so: --format NAME"
    )


def _guess_folder(source: Path) -> Format:
    if (source / MANIFEST).exists() and (source / "train").is_dir():
        return "shards"
    if _first(source, ".tar"):
        return "img2dataset"
    tables = sorted(source.glob("*.parquet"))[:1]
    if tables and is_table(tables[0]) and (source / tables[0].stem).is_dir():
        return "img2dataset"  # its "files" layout
    if _first(source, ".parquet") and not _first(source, *IMAGES):
        return "parquet"
    return "folder"


def _first(folder: Path, *endings: str) -> bool:
    """Whether there is a file with one of these endings, at any depth."""
    return any(name.lower().endswith(endings) for _, _, names in os.walk(folder) for name in names)
