"""COCO captions: an annotations file and a folder with its images, or the folder in which both lie."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv import files
from vlv.data.readers.listed import Entry
from vlv.data.shards import DataError


def images_of(annotations: Path) -> Path:
    """annotations/captions_train2017.json -> train2017, beside the annotations folder or in it.

    Raises:
        DataError: there is no such folder.
    """
    name = annotations.stem.removeprefix("captions_")
    above = annotations.parent.parent
    found = next(
        (one for one in (above / name, above / "images" / name, annotations.parent / name) if one.is_dir()), None
    )
    if found is None:
        raise DataError(f"{above / name} is not a folder. Say where the images are: --images FOLDER")
    return found


def in_folder(root: Path) -> list[Path]:
    """The captions files of a COCO folder: captions_NAME.json, in `annotations` or in the folder itself."""
    return sorted([*root.glob("annotations/captions_*.json"), *root.glob("captions_*.json")])


def entries(annotations: Path, prefix: str = "") -> Iterator[Entry]:
    """The images of an annotations file with their captions; `prefix` goes before each name.

    The file is read at once (COCO's largest, 118,000 images, is 90 MB); the images are not.

    Raises:
        DataError: not a captions file.
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
    """Whether a JSON file begins as an annotations file does; it is not read to its end."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    return bool(re.match(rb"\s*\{", head)) and bool(re.search(rb'"(images|annotations)"\s*:\s*\[', head))
