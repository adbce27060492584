"""A folder of own images, with captions or without, made into shards; what is left out has a reason."""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlv import config, files, images
from vlv.data import writer
from vlv.data.shards import DataError, Manifest
from vlv.data.writer import Progress, Record

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.08


@dataclass(frozen=True)
class Note:
    """One image that was left out, or kept without its caption. `path` is relative to the imported folder."""

    path: str
    reason: str
    message: str


@dataclass
class ImportReport:
    """What became of an imported folder."""

    manifest: Manifest
    found: int
    dropped: list[Note] = field(default_factory=list)
    captions_left_out: list[Note] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many images were kept, and how many dropped or without caption for each reason."""
        notes = Counter(note.reason for note in (*self.dropped, *self.captions_left_out))
        return {"found": self.found, "kept": self.found - len(self.dropped), **dict(sorted(notes.items()))}


def import_folder(
    folder: Path,
    data: Path,
    *,
    image_size: int,
    shard_size: int,
    gate: config.DataGate,
    description: str | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Replace `data` by the images below `folder`, cut to `image_size` squares and stored as PNG.

    Upright by EXIF; captions are `.txt` files of the same name. Dropped, with the reason as status in
    samples.parquet: `unreadable`, `too_small` (shorter side below gate.min_side), `aspect` (above
    gate.max_aspect), `duplicate`. The split goes by the hash of the stored image, about 90 / 2 / 8 %, and
    validation and test get at least one of three or more. Equal folders give equal bytes. Memory holds one
    image, and a short record for each.

    Raises:
        DataError: no such folder, no image in it that can be used, or `data` and `folder` lie in one another.
    """
    source, target = folder.resolve(), data.resolve()
    if not source.is_dir():
        raise DataError(f"{folder} is not a folder")
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise DataError(f"{folder} and {data} lie in one another; {data} is replaced, so move the images elsewhere")
    found = _find(source)
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import.", dir=data.parent) as spool:
        reader = _Reader(source, Path(spool), image_size, gate)
        for number, path in enumerate(found, 1):
            reader.read(path)
            if progress is not None and (number % 100 == 0 or number == len(found)):
                progress("import", number, len(found))
        if not reader.kept:
            reasons = dict(Counter(note.reason for note in reader.dropped))
            raise DataError(f"{folder}: none of {len(found)} images can be used {reasons or ''}. {data} is unchanged.")
        about = {"kind": "imported", "description": description or source.name}
        about_sizes = {"image_size": image_size, "shard_size": shard_size, "counts": reader.counts()}
        with files.atomic_folder(data) as temporary:
            splits = {
                split: writer.write_split(temporary / split, reader.records(keys, split == "train"), shard_size)
                for split, keys in _split(list(reader.kept)).items()
            }
            manifest = Manifest(source=about | about_sizes, splits=splits)
            writer.write_manifest(temporary, manifest)
    return ImportReport(manifest, len(found), reader.dropped, reader.captions_left_out)


def _find(folder: Path) -> list[Path]:
    """Image files below `folder` by name, in the order of their relative names; hidden ones left out."""
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in EXTENSIONS and not hidden and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _split(kept: list[str]) -> dict[str, list[str]]:
    """Keys (hashes of stored images) by split, each in the order of the hashes: a first shuffle."""
    shares = {key: int(key[:8], 16) / 2**32 for key in kept}
    chosen: dict[str, str] = {}
    for key, share in shares.items():
        test = share >= 1 - TEST_SHARE
        chosen[key] = "validation" if share < VALIDATION_SHARE else "test" if test else "train"
    if len(kept) >= 3:
        low_to_high = sorted(kept, key=lambda key: shares[key])
        chosen[low_to_high[0]], chosen[low_to_high[-1]] = "validation", "test"
        if "train" not in chosen.values():
            chosen[low_to_high[1]] = "train"
    else:
        chosen = dict.fromkeys(kept, "train")
    return {split: [key for key in sorted(kept) if chosen[key] == split] for split in ("train", "validation", "test")}


class _Reader:
    """Reads the images one by one; keeps their cut PNGs in the spool folder, so that each is decoded once."""

    def __init__(self, source: Path, spool: Path, image_size: int, gate: config.DataGate) -> None:
        self._source, self._spool, self._size, self._gate = source, spool, image_size, gate
        self.kept: dict[str, Record] = {}  # hash of the stored image -> record without the image
        self.dropped: list[Note] = []
        self.captions_left_out: list[Note] = []
        self._failed: list[Record] = []

    def read(self, path: Path) -> None:
        url = path.relative_to(self._source).as_posix()
        try:
            pixels = images.decode(path.read_bytes(), url)
        except (images.ImageError, OSError) as error:
            self._drop(url, "unreadable", str(error))
            return
        height, width = pixels.shape[:2]
        short, long = min(height, width), max(height, width)
        if short < self._gate.min_side:
            message = f"{width}x{height} pixels, the shorter side must be {self._gate.min_side} or more"
            self._drop(url, "too_small", message, width, height)
        elif long > self._gate.max_aspect * short:
            message = f"{width}x{height} pixels, aspect {long / short:.2f} is above {self._gate.max_aspect}"
            self._drop(url, "aspect", message, width, height)
        else:
            self._keep(path, url, images.encode_png(images.resize_crop(pixels, self._size)), width, height)

    def _keep(self, path: Path, url: str, png: bytes, width: int, height: int) -> None:
        key = files.sha256_bytes(png)
        if key in self.kept:
            self._drop(url, "duplicate", f"same picture as {self.kept[key].url}", width, height)
            return
        (self._spool / key).write_bytes(png)
        self.kept[key] = Record(
            url=url,
            caption=self._caption(path.with_suffix(".txt"), url),
            width=self._size,
            height=self._size,
            original_width=width,
            original_height=height,
            mode="RGB",
        )

    def _caption(self, path: Path, url: str) -> str | None:
        """The text beside an image, blanks and line ends made one space; None if there is none to use."""
        if not path.exists():
            return None
        try:
            caption = " ".join(path.read_text(encoding="utf-8").split())
        except (UnicodeDecodeError, OSError) as error:
            self.captions_left_out.append(Note(url, "caption_unreadable", f"{path.name}: {error}"))
            return None
        if not caption:
            self.captions_left_out.append(Note(url, "caption_empty", f"{path.name} is empty"))
        return caption or None

    def _drop(self, url: str, reason: str, message: str, width: int | None = None, height: int | None = None) -> None:
        logger.info("%s left out: %s (%s)", url, reason, message)
        self.dropped.append(Note(url, reason, message))
        self._failed.append(
            Record(url, original_width=width, original_height=height, status=reason, error_message=message)
        )

    def counts(self) -> dict[str, int]:
        reasons = Counter(note.reason for note in (*self.dropped, *self.captions_left_out))
        return {"kept": len(self.kept), **dict(sorted(reasons.items()))}

    def records(self, keys: list[str], with_failed: bool) -> Iterator[Record]:
        """Kept records with their images; then, where asked for, the rows of those left out."""
        for key in keys:
            record = self.kept[key]
            yield Record(**{**vars(record), "image": (self._spool / key).read_bytes()})
        if with_failed:
            yield from self._failed
