"""COCO captions: an annotations file, and a folder with its images."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlv import files
from vlv.data.readers import captions
from vlv.data.readers.found import Content, Found, rank, stamp
from vlv.data.readers.names import Rule
from vlv.data.shards import DataError


@dataclass(frozen=True)
class _Picture:
    id: int
    name: str
    captions: list[str]


class CocoReader:
    """The images of an annotations file in an order shuffled by `seed`; one of the captions by `rule`.

    The others go into the sample's JSON as `captions`. The annotations are read at once (COCO's largest file,
    118,000 images, is 90 MB); the images are not.

    Raises:
        DataError: not a captions file, or no folder of images.
    """

    format = "coco"

    def __init__(self, annotations: Path, folder: Path | None, seed: int, rule: Rule) -> None:
        self._file, self._seed, self._rule = annotations, seed, rule
        self._folder = folder or _beside(annotations)
        if not self._folder.is_dir():
            raise DataError(f"{self._folder} is not a folder. Say where the images are: --images FOLDER")
        try:
            self._pictures = _parse(files.read_json(annotations))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{annotations} is not a COCO captions file ({type(error).__name__}: {error}); it needs "
                "images: [{id, file_name}] and annotations: [{id, image_id, caption}]"
            ) from error
        self._pictures.sort(key=lambda picture: (rank(seed, picture.name), picture.id))

    def total(self) -> int:
        return len(self._pictures)

    def fingerprint(self) -> str:
        return stamp([self._file])

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        """One part: the images."""
        for index, picture in enumerate(self._pictures[skip:], skip):
            name = PurePosixPath(picture.name)
            if name.is_absolute() or ".." in name.parts:
                yield Found(part, index, picture.name, None, "outside_folder", "the name leads out of the folder")
            elif not (self._folder / name).exists():
                yield Found(part, index, picture.name, None, "image_missing", f"{self._folder.name} does not have it")
            else:
                yield Found(part, index, picture.name, functools.partial(self._load, picture))

    def _load(self, picture: _Picture) -> Content:
        image = (self._folder / picture.name).read_bytes()
        meta: dict[str, Any] = {"origin": {"coco_image_id": picture.id}}
        usable = [text for text in picture.captions if text.strip()]
        if not usable:
            return Content(image, caption_problem=("caption_missing", f"{self._file.name} has none"), meta=meta)
        caption, others = captions.pick(usable, self._rule, self._seed, picture.name)
        return Content(image, caption, meta=meta | others)


def is_annotations(path: Path) -> bool:
    """Whether a JSON file begins as an annotations file does; it is not read to its end."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    return bool(re.match(rb"\s*\{", head)) and any(word in head for word in (b'"images"', b'"annotations"'))


def _beside(annotations: Path) -> Path:
    """annotations/captions_train2017.json -> train2017, beside the annotations folder or in it."""
    name = annotations.stem.removeprefix("captions_")
    above = annotations.parent.parent / name
    return above if above.is_dir() else annotations.parent / name


def _parse(value: dict[str, Any]) -> list[_Picture]:
    texts: dict[int, list[tuple[int, str]]] = {}
    for note in value["annotations"]:
        texts.setdefault(int(note["image_id"]), []).append((int(note["id"]), str(note["caption"])))
    return [
        _Picture(
            int(image["id"]), str(image["file_name"]), [text for _, text in sorted(texts.get(int(image["id"]), []))]
        )
        for image in value["images"]
    ]
