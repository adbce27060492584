"""How one foreign image becomes a record of ours."""

from dataclasses import dataclass, replace

from vlv.config import Resize
from vlv.data import writer
from vlv.data.readers.found import Content, Found, Split, readable
from vlv.data.readers.names import Encoding
from vlv.data.writer import Record
from vlv.io import files, images


@dataclass(frozen=True)
class Recipe:
    """What every image is held to and made into; sizes in pixels.

    Dropped, by name: `unreadable`, `too_small` (shorter side below `min_side`), `aspect` (longer / shorter side
    above `max_aspect`). The rest is cut to `image_size` squares (in the way of `resize`) and stored as PNG (lossless,
    the same bytes on every machine) or as JPEG (quality 95, a fifth of the space or so).
    """

    image_size: int
    min_side: int
    max_aspect: float
    encoding: Encoding = "png"
    resize: Resize = "bicubic"


@dataclass(frozen=True)
class Prepared:
    """A record on its way to a shard; `place` is where it was found.

    `content` is the hash of the pixels as stored, `source_sha256` that of the bytes as found; None for a dropped
    one. `split` is given where the source decides it. `caption_problem`: a caption that was there and left out.
    """

    place: Found
    record: Record
    content: str | None = None
    source_sha256: str | None = None
    split: Split | None = None
    caption_problem: tuple[str, str] | None = None


def prepare(found: Found, recipe: Recipe) -> Prepared:
    """Load, decode, check, cut and encode one sample. Never raises for bad data: what fails is dropped by name."""
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
    """The same sample, left out after all."""
    record = prepared.record
    return _dropped(prepared.place, reason, message, record.original_width, record.original_height)


def with_caption(prepared: Prepared, caption: str) -> Prepared:
    """The same sample with another caption (blanks and line ends made one space)."""
    record = replace(prepared.record, caption=" ".join(caption.split()), error_message=None)
    return replace(prepared, record=record, caption_problem=None)


def _dropped(found: Found, reason: str, message: str, width: int | None = None, height: int | None = None) -> Prepared:
    record = Record(found.url, original_width=width, original_height=height, status=reason, error_message=message)
    return Prepared(found, record)
