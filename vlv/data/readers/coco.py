"""Reads COCO captions: an annotations file and its folder of images, or the folder that holds both."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv.data.readers.formats import ReadOptions
from vlv.data.readers.listed import Entry, ListedReader, open_listed
from vlv.data.shards import DataError
from vlv.io import files

logger = logging.getLogger(__name__)


def recognises(format: str, source: Path, inside: frozenset[str]) -> bool:
    """An annotations file, or a folder with one."""
    if source.is_dir():
        return bool(in_folder(source))
    return source.suffix.lower() == ".json" and is_annotations(source)


def open_reader(format: str, source: Path, scratch: Path, options: ReadOptions) -> ListedReader:
    """The reader of an annotations file or of a COCO folder.

    Raises:
        DataError: no captions file, or its images are not there.
    """
    if source.is_dir():
        tables, listed = of_folder(source)
        return open_listed(format, source, tables, listed, [options.images or source], scratch, options)
    images = options.images or images_of(source)
    if images is None:
        raise DataError(f"{source}: its images are not beside it. Say where they are: --images FOLDER")
    return open_listed(format, source, [source], entries(source), [images], scratch, options)


def images_of(annotations: Path) -> Path | None:
    """The folder of images of annotations/captions_train2017.json: train2017, beside or in the annotations folder."""
    name = annotations.stem.removeprefix("captions_")
    above = annotations.parent.parent
    places = (above / name, above / "images" / name, annotations.parent / name)
    return next((path for path in places if path.is_dir()), None)


def in_folder(root: Path) -> list[Path]:
    """The captions files of a COCO folder: captions_NAME.json, in `annotations` or in the folder itself."""
    return sorted([*root.glob("annotations/captions_*.json"), *root.glob("captions_*.json")])


def of_folder(root: Path) -> tuple[list[Path], Iterator[Entry]]:
    """The captions files of a COCO folder that have their images there, and their entries.

    Names are relative to `root`.

    Raises:
        DataError: no captions file has its images there.
    """
    places = {path: images_of(path) for path in in_folder(root)}
    found = {path: place for path, place in places.items() if place is not None}
    for path in sorted(set(places) - set(found)):
        logger.warning("%s is left out: its images are not in %s", path.name, root)
    if not found:
        raise DataError(
            f"{root} has no captions file (annotations/captions_NAME.json) with its folder of images (NAME). "
            "Name the file, and say where its images are: --images FOLDER"
        )
    named = ((path, place.relative_to(root).as_posix()) for path, place in found.items())
    return list(found), (entry for path, name in named for entry in entries(path, f"{name}/"))


def entries(annotations: Path, prefix: str = "") -> Iterator[Entry]:
    """The images of an annotations file with their captions; `prefix` is put before each name.

    The file is read as a whole (COCO's largest has 118,000 images and 90 MB). Images are not read here.

    Raises:
        DataError: it is not a captions file.
    """
    try:
        value = files.read_json(annotations, "Correct it.")
        texts: dict[int, list[tuple[int, str]]] = {}
        for note in value["annotations"]:
            texts.setdefault(int(note["image_id"]), []).append((int(note["id"]), str(note["caption"])))
        pictures = sorted((int(image["id"]), str(image["file_name"])) for image in value["images"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{annotations} is not a COCO captions file ({type(error).__name__}: {error}); it needs "
            "images: [{id, file_name}] and annotations: [{id, image_id, caption}]"
        ) from error
    missing = ("caption_missing", f"{annotations.name} has none")
    for number, name in pictures:
        meta: dict[str, Any] = {"origin": {"coco_image_id": number}}
        yield Entry(prefix + name, [text for _, text in sorted(texts.get(number, []))] or None, missing, meta)


def is_annotations(path: Path) -> bool:
    """Whether a JSON file begins like an annotations file. Only its beginning is read."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    return bool(re.match(rb"\s*\{", head)) and bool(re.search(rb'"(images|annotations)"\s*:\s*\[', head))
