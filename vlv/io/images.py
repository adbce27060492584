"""Images between bytes, uint8 pixels and the models' [-1, 1] range.

Pixel ranges change only here. Shapes: arrays are (H, W, 3) uint8, batches for models are
(B, 3, H, W), uint8 in 0..255 or float in [-1, 1].
"""

import base64
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from vlv.config import Config, Resize

Pixels = NDArray[np.uint8]

# The accepted formats and their file suffixes. Pillow reads forty more. Some of them run a program (EPS starts
# Ghostscript whatever the file is called), and many are hardly tested against attacks.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"), "AVIF": (".avif",),
}  # fmt: skip
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# A larger picture is refused before its pixels are decoded: a decompression bomb would take all memory.
MAX_PIXELS = 200_000_000


class ImageError(ValueError):
    """Bytes that are not a readable image."""


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open a picture of one of the `FORMATS` without decoding it; any error in the block becomes an `ImageError`.

    Decoders raise many kinds of errors for damaged files: OSError, SyntaxError, struct.error, NotImplementedError,
    RuntimeError, and MemoryError for a false size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a readable image (none of {', '.join(FORMATS)})") from error
    except Exception as error:
        raise ImageError(f"{name}: not a readable image ({str(error) or type(error).__name__})") from error


def decode(data: bytes, name: str = "image") -> Pixels:
    """Decode one of the `FORMATS` to (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    The content decides the format, not the file's name, and no program is started. Transparent pixels are laid
    on white; an animation gives its first frame. `name` is the image's name in error messages.

    Raises:
        ImageError: another format, unreadable, truncated or larger than `MAX_PIXELS`.
    """
    with _opened(data, name) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Pixels:
    """A Pillow image -> (H, W, 3) uint8 RGB: turned upright by its EXIF orientation, transparent pixels on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow clips 16 bits at 255, which gives a white picture
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def decode_base64(text: str, name: str = "image") -> Pixels:
    """Decode an image file given as base64, as `decode` does.

    Raises:
        ImageError: as for `decode`, and for text that is not base64.
    """
    try:
        data = base64.b64decode(text)
    except (ValueError, TypeError) as error:
        raise ImageError(f"{name}: not base64 ({error})") from error
    return decode(data, name)


def header(data: bytes, name: str = "image") -> tuple[int, int, str]:
    """Width and height in pixels as stored (before any rotation), and Pillow's name of the mode.

    Raises:
        ImageError: as for `decode`, where the first bytes show it.
    """
    with _opened(data, name) as image:
        return image.width, image.height, image.mode


def encode_png(pixels: Pixels) -> bytes:
    """Encode (H, W, 3) uint8 as PNG, to the same bytes on every machine.

    The data set's hash depends on these bytes. Run-length deflate (zlib's Z_RLE) does not search for matches in a
    hash table; that search differs between zlib builds for different processors.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_type=3)
    return buffer.getvalue()


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """Encode (H, W, 3) uint8 as JPEG without chroma subsampling; other builds of libjpeg may give other bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def shrink(pixels: Pixels, longest: int) -> Pixels:
    """Scale (H, W, 3) down so that the longer side is at most `longest` pixels; smaller images stay unchanged."""
    height, width = pixels.shape[:2]
    if max(height, width) <= longest:
        return pixels
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def resize_crop(pixels: Pixels, size: int, how: Resize = "bicubic") -> Pixels:
    """Scale the shorter side to `size` (antialiased) and cut the centre square: (size, size, 3)."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    if how == "torchvision":
        return _resize_crop_as_torchvision(pixels, size)
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    image = Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resize_crop_as_torchvision(pixels: Pixels, size: int) -> Pixels:
    """As torchvision's `Resize(size)` and `CenterCrop(size)` do for a PIL image by default: bilinear, the longer
    side rounded down, the margin rounded to nearest."""
    height, width = pixels.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    target = (size, longer) if width <= height else (longer, size)
    image = Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def scale(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Squares (B, 3, S, S) uint8 -> (B, 3, size, size) uint8, bicubic and antialiased; unchanged if S is `size`."""
    if batch.shape[-1] == size:
        return batch
    resized = F.interpolate(batch.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def to_batch(pixels: Sequence[Pixels] | Pixels) -> torch.Tensor:
    """Stack (H, W, 3) arrays to a (B, 3, H, W) uint8 tensor."""
    array = np.stack(list(pixels)) if not isinstance(pixels, np.ndarray) else pixels
    return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2).contiguous()


def to_model(batch: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 in 0..255 -> float32 in [-1, 1]."""
    return batch.float() / 127.5 - 1.0


def to_processor(batch: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 as an image processor does it: scaled to 0..1, minus its mean, divided by its
    std (both broadcast)."""
    return ((to_model(batch) + 1) / 2 - mean) / std


def to_pixels(batch: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) float in [-1, 1] -> uint8, rounded to nearest; values outside are clipped.

    The inverse of `to_model` for all 256 values.
    """
    return ((batch.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_arrays(batch: torch.Tensor) -> list[Pixels]:
    """(B, 3, H, W) uint8 -> list of (H, W, 3) arrays."""
    return list(batch.permute(0, 2, 3, 1).cpu().numpy())


def grid(
    rows: Sequence[Sequence[Pixels]],
    labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    tile: int = 128,
    gap: int = 4,
) -> Pixels:
    """Rows of images as one picture: `tile` pixels each, `labels` beside the rows, `captions` under the columns."""
    columns = max(len(row) for row in rows)
    margin = 110 if labels else 0
    texts = ["\n".join(textwrap.wrap(caption, tile // 6)) for caption in captions[:columns]]
    below = 14 * max((text.count("\n") + 1 for text in texts), default=0)
    size = (margin + columns * (tile + gap) + gap, len(rows) * (tile + gap) + gap + below)
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        top = gap + r * (tile + gap)
        if labels:
            draw.text((6, top + tile // 2 - 6), labels[r], fill=(40, 40, 40))
        for c, pixels in enumerate(row):
            small = min(pixels.shape[:2]) < tile
            how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
            canvas.paste(Image.fromarray(pixels).resize((tile, tile), how), (margin + gap + c * (tile + gap), top))
    for c, text in enumerate(texts):
        left, top = margin + gap + c * (tile + gap), len(rows) * (tile + gap) + gap
        draw.multiline_text((left + 1, top), text, fill=(40, 40, 40), spacing=3)
    return np.asarray(canvas)


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of one model.

    Attributes:
        square: side of the training data's squares in pixels (data.image_size).
        resize: how a picture is resized to that square (data.resize).
        tower: side of the vision tower's input in pixels (encoder.image_size).
    """

    square: int
    resize: Resize
    tower: int

    @staticmethod
    def of(settings: Config) -> "Preprocessing":
        """The preprocessing of a configuration; a saved model has its own."""
        return Preprocessing(settings.data.image_size, settings.data.resize, settings.encoder.image_size)

    def cut(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """Pictures (H, W, 3) uint8 of any size -> a batch (B, 3, S, S) uint8 of the training data's squares."""
        return to_batch([resize_crop(picture, self.square, self.resize) for picture in pictures])

    def for_tower(self, batch: torch.Tensor) -> torch.Tensor:
        """Squares (B, 3, S, S) uint8 -> (B, 3, T, T) uint8.

        Raises:
            ValueError: the images are not squares of the training data's size.
        """
        if batch.shape[2:] != (self.square, self.square):
            raise ValueError(
                f"images of {batch.shape[3]}x{batch.shape[2]} pixels: this model takes squares of {self.square}, as it "
                "was trained on; cut them with Preprocessing.cut"
            )
        return scale(batch, self.tower)
