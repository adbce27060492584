"""Which format a source has, and the reader for it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vlv.data.readers import coco, imagefolder, table
from vlv.data.readers.arrow import STATE, ArrowReader
from vlv.data.readers.folder import FilesReader, FolderReader
from vlv.data.readers.found import IMAGES, Reader
from vlv.data.readers.img2dataset import is_table
from vlv.data.readers.listed import Entry, ListedReader
from vlv.data.readers.names import Format, Rule
from vlv.data.readers.parquet import ParquetReader
from vlv.data.readers.tars import ENDINGS as TARS
from vlv.data.readers.tars import TarReader
from vlv.data.shards import MANIFEST, DataError

FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read; what a format does not know it ignores.

    `format` None: guessed. `images` is the folder of images of a format that names them (None: guessed).
    `image_column` and `caption_column` are those of a format with columns (None: guessed); caption_column "none":
    there are no captions. `rule` chooses one of several captions, `seed` decides it and the order of the source.
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
    if chosen in ("coco", "table", "llava", "imagefolder"):
        return _listed(chosen, source, scratch, options)
    seed, rule = options.seed, options.rule
    if chosen in ("parquet", "arrow"):
        kind = ParquetReader if chosen == "parquet" else ArrowReader
        return kind(source, seed, rule, options.image_column, options.caption_column, options.images)
    if chosen == "shards" or (chosen == "img2dataset" and (source.is_file() or ".tar" in _inside(source))):
        return TarReader(source, seed, rule, ours=chosen == "shards")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    if chosen == "img2dataset":
        return FilesReader(source, scratch, seed, rule)
    return FolderReader(source, scratch, seed, rule)


def _listed(chosen: Format, source: Path, scratch: Path, options: ReadOptions) -> ListedReader:
    """A reader of what some file lists."""
    image, caption = options.image_column, options.caption_column
    entries: Iterable[Entry]
    tables, folders = [source], [options.images or source]
    if chosen == "coco" and source.is_dir():
        tables, entries = coco.of_folder(source)
    elif chosen == "coco":
        images = options.images or coco.images_of(source)
        if images is None:
            raise DataError(f"{source}: its images are not beside it. Say where they are: --images FOLDER")
        folders = [images]
        entries = coco.entries(source)
    elif chosen == "imagefolder":
        tables = imagefolder.tables(source)
        entries = imagefolder.entries(source, tables, image, caption)
    else:
        tables = [source] if source.is_file() else _conversations(source)
        if options.images is None and tables:
            beside = tables[0].parent
            guesses = (beside, beside / "images", beside.parent, beside.parent / "images")
            folders = [path for path in guesses if path.is_dir()]
        entries = (entry for one in tables for entry in table.entries(one, image, caption))
    if not tables:
        raise DataError(
            f"{source} has no file that lists its images, as {chosen} has; name the file, or another --format"
        )
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise DataError(f"{missing} is not a folder. Say where the images are: --images FOLDER")
    return ListedReader(chosen, tables, entries, folders, scratch, options.seed, options.rule)


def guess(source: Path) -> Format:
    """The format by what the path is.

    Raises:
        DataError: no such path, or a file of no format that is known.
    """
    if source.is_dir():
        return _guess_folder(source)
    if not source.exists():
        raise DataError(f"There is no {source}")
    name, ending = source.name.lower(), source.suffix.lower()
    if ending in (".parquet", ".arrow"):
        return "parquet" if ending == ".parquet" else "arrow"
    if name.endswith(TARS):
        return "img2dataset"
    if ending == ".json" and coco.is_annotations(source):
        return "coco"
    if ending == ".json" and table.is_conversations(source):
        return "llava"
    if ending in table.ENDINGS:
        return "table"
    raise DataError(
        f"{source} is neither a folder nor a file that ends in .parquet, .arrow, {', '.join(TARS)}, "
        f"{', '.join(table.ENDINGS)}. If it is one of {', '.join(FORMATS)}, say so: --format NAME"
    )


def _guess_folder(source: Path) -> Format:
    inside = _inside(source)
    with_images = not inside.isdisjoint(IMAGES)
    if (source / MANIFEST).exists() and (source / "train").is_dir():
        return "shards"
    if ".tar" in inside:
        return "img2dataset"
    tables = sorted(source.glob("*.parquet"))[:1]
    if tables and is_table(tables[0]) and (source / tables[0].stem).is_dir():
        return "img2dataset"  # its "files" layout
    if ".arrow" in inside and (STATE in inside or not with_images):
        return "arrow"
    if with_images and not inside.isdisjoint(imagefolder.NAMES):
        return "imagefolder"
    if ".parquet" in inside and not with_images:
        return "parquet"
    if coco.in_folder(source):
        return "coco"
    if len(_conversations(source)) == 1:
        return "llava"
    return "folder"


def _inside(folder: Path) -> set[str]:
    """The endings of all files at any depth (.tar for a compressed one too), and the names that tell a format."""
    found: set[str] = set()
    for _, _, names in os.walk(folder):
        for name in names:
            lower = name.lower()
            found.add(".tar" if lower.endswith(TARS) else Path(lower).suffix)
        found |= {STATE, *imagefolder.NAMES} & set(names)
    return found


def _conversations(source: Path) -> list[Path]:
    """LLaVA's files in a folder."""
    return [path for path in sorted(source.glob("*.json")) if table.is_conversations(path)]
