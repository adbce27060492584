"""How one image becomes a record: cut, put into a split, counted."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from vlv.config import Encoding, Resize
from vlv.data import writer
from vlv.data.readers.found import Content, Found, Split, readable
from vlv.data.writer import Record
from vlv.io import files, images


@dataclass(frozen=True)
class Recipe:
    """The bounds that every image must meet, and what becomes of it. Sizes are in pixels.

    An image is dropped as `unreadable`, `too_small` (shorter side below `min_side`) or `aspect` (longer / shorter side
    above `max_aspect`). The others are cut to squares of `image_size` (`resize` says how) and stored as PNG (lossless,
    the same bytes on every machine) or as JPEG (quality 95, about a fifth of the space).
    """

    image_size: int
    min_side: int
    max_aspect: float
    encoding: Encoding = "png"
    resize: Resize = "bicubic"


@dataclass(frozen=True)
class Prepared:
    """A record that is ready for a shard.

    Attributes:
        place: where the sample was found.
        content: hash of the pixels as they are stored; None for a dropped sample.
        source_sha256: hash of the image file as it was found; None for a dropped sample.
        split: if the source decides it.
        caption_problem: reason and message for a caption that was found and left out.
    """

    place: Found
    record: Record
    content: str | None = None
    source_sha256: str | None = None
    split: Split | None = None
    caption_problem: tuple[str, str] | None = None


def prepare(found: Found, recipe: Recipe) -> Prepared:
    """Load, decode, check, cut and encode one sample. A bad sample is dropped with a reason; it raises nothing."""
    if found.load is None:
        return _dropped(found, found.reason, found.message)
    try:
        content = found.load()
        pixels = images.decode(content.image, found.url)
        writer.to_json(content.meta)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        return _dropped(found, "unreadable", readable(str(error)) or type(error).__name__)
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    if short < recipe.min_side:
        message = f"{width}x{height} pixels, the shorter side must be {recipe.min_side} or more"
        return _dropped(found, "too_small", message, width, height)
    if long > recipe.max_aspect * short:
        message = f"{width}x{height} pixels, aspect {long / short:.2f} is above {recipe.max_aspect}"
        return _dropped(found, "aspect", message, width, height)
    return _kept(found, content, images.resize_crop(pixels, recipe.image_size, recipe.resize), (width, height), recipe)


def _kept(found: Found, content: Content, cut: images.Pixels, size: tuple[int, int], recipe: Recipe) -> Prepared:
    png = recipe.encoding == "png"
    caption = None if content.caption is None else " ".join(content.caption.split()) or None
    problem = content.caption_problem
    if problem is not None:
        problem = (problem[0], readable(problem[1]))
    record = Record(
        url=readable(content.url or found.url),
        image=images.encode_png(cut) if png else images.encode_jpeg(cut),
        extension="png" if png else "jpg",
        caption=caption,
        width=recipe.image_size,
        height=recipe.image_size,
        original_width=size[0],
        original_height=size[1],
        mode="RGB",
        error_message=None if problem is None else f"{problem[0]}: {problem[1]}",
        meta=content.meta,
    )
    pixels, source = files.sha256_bytes(cut.tobytes()), files.sha256_bytes(content.image)
    return Prepared(found, record, pixels, source, content.split, problem)


def drop(prepared: Prepared, reason: str, message: str) -> Prepared:
    """The same sample, dropped."""
    record = prepared.record
    return _dropped(prepared.place, reason, message, record.original_width, record.original_height)


def with_caption(prepared: Prepared, caption: str) -> Prepared:
    """The same sample with another caption; each run of white space becomes one space."""
    record = replace(prepared.record, caption=" ".join(caption.split()), error_message=None)
    return replace(prepared, record=record, caption_problem=None)


def _dropped(found: Found, reason: str, message: str, width: int | None = None, height: int | None = None) -> Prepared:
    record = Record(found.url, original_width=width, original_height=height, status=reason, error_message=message)
    return Prepared(found, record)


SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Shares:
    """Shares of the images for validation and test; the others are for training.

    The split of an image is a function of its pixels and the seed. So more images do not move the others.
    """

    validation: float = 0.02
    test: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"shares {self.validation} and {self.test}: not negative, with a sum below 1")

    def position(self, content: str) -> float:
        """The position in [0, 1) of an image (hex hash of its pixels): validation is lowest, test is highest."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{content}".encode()).digest()[:6], "big") / 2**48

    def split_of(self, content: str) -> Split:
        """The split of an image."""
        position = self.position(content)
        if position < self.validation:
            return "validation"
        return "test" if position >= 1 - self.test else "train"

    def wanted(self) -> set[Split]:
        """The splits that should have images."""
        shares: dict[Split, float] = {"train": 1.0, "validation": self.validation, "test": self.test}
        return {split for split, share in shares.items() if share}

    def filled(self, contents: list[str]) -> dict[str, Split]:
        """The splits of a small set: as `split_of`, but no split stays empty if there are enough images.

        The image at the lowest position goes to validation, the one at the highest to test. This is the only case in
        which a later image can move an earlier one.
        """
        order = sorted(contents, key=self.position)
        if len(order) < len(self.wanted()):
            return dict.fromkeys(order, "train")
        chosen = {content: self.split_of(content) for content in order}
        if self.validation:
            chosen[order[0]] = "validation"
        if self.test:
            chosen[order[-1]] = "test"
        if "train" not in chosen.values():
            chosen[order[len(order) // 2]] = "train"
        return chosen


_EXAMPLES = 20  # kept for each reason


@dataclass(frozen=True)
class Note:
    """A sample that was dropped, or kept without its caption."""

    path: str
    reason: str
    message: str


@dataclass
class Tally:
    """Counts of samples: found, kept, and, by reason, dropped or kept without their caption.

    `notes` has the first few samples of each reason.
    """

    found: int = 0
    kept: int = 0
    captions: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    captions_left_out: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)

    def add(self, sample: Prepared) -> None:
        """Count one sample."""
        self.found += 1
        if sample.content is None:
            reason, message = sample.record.status, sample.record.error_message or ""
            self.dropped[reason] += 1
            self._note(Note(sample.place.url, reason, message), self.dropped[reason])
            return
        self.kept += 1
        self.captions += sample.record.caption is not None
        if sample.caption_problem is not None:
            reason, message = sample.caption_problem
            self.captions_left_out[reason] += 1
            self._note(Note(sample.place.url, reason, message), self.captions_left_out[reason])

    def _note(self, note: Note, count: int) -> None:
        if count <= _EXAMPLES:
            self.notes.append(note)

    def extend(self, other: "Tally") -> None:
        """Add the counts of a tally that follows this one."""
        self.found += other.found
        self.kept += other.kept
        self.captions += other.captions
        self.dropped.update(other.dropped)
        self.captions_left_out.update(other.captions_left_out)
        have = Counter(note.reason for note in self.notes)
        for note in other.notes:
            have[note.reason] += 1
            self._note(note, have[note.reason])

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`. (dataclasses.asdict breaks counters.)"""
        return {**vars(self), "notes": [asdict(note) for note in self.notes]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Tally":
        """A tally from what `to_json` gave."""
        reasons = {name: Counter(value[name]) for name in ("dropped", "captions_left_out")}
        return Tally(**{**value, **reasons, "notes": [Note(**note) for note in value["notes"]]})

    def counts(self) -> dict[str, int]:
        """Numbers of kept samples, of samples with a caption, and of samples by reason."""
        reasons = self.dropped + self.captions_left_out
        return {"kept": self.kept, "with_caption": self.captions, **dict(sorted(reasons.items()))}
