"""Hugging Face's imagefolder: images, and a metadata file for all below it or for each subfolder."""

import os
from collections.abc import Iterator
from pathlib import Path

from vlv.data.readers import table
from vlv.data.readers.found import IMAGES
from vlv.data.readers.listed import Entry

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def tables(root: Path) -> list[Path]:
    """The metadata files of a folder, at any depth."""
    return sorted(Path(folder, name) for folder, _, names in _walk(root) for name in names if name in NAMES)


def entries(root: Path, found: list[Path], image: str | None, caption: str | None) -> Iterator[Entry]:
    """What the metadata files say, and the images that none of them names; names are relative to `root`.

    Raises:
        DataError: from vlv.data.readers.table.
    """
    for path in found:
        inside = path.parent.relative_to(root).as_posix()
        yield from table.entries(path, image, caption, "" if inside == "." else f"{inside}/")
    unnamed = ("caption_missing", f"{found[0].name} does not name it")
    for folder, _, names in _walk(root):
        for name in names:
            if Path(name).suffix.lower() in IMAGES and not name.startswith("."):
                yield Entry(Path(folder, name).relative_to(root).as_posix(), None, unnamed, listed=False)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk; hidden folders are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, subfolders, names
