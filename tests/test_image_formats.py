"""`images.decode` opens a short list of formats, starts no program, and raises one kind of error for any damage."""

import functools
import io
import os
import random
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from tests.test_import import wanted
from vlv.data.import_.importer import import_images
from vlv.data.shards import DataError
from vlv.inference import _readable
from vlv.io import images

# Pillow warns about oddities in files that it still reads.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

_FOREIGN = ("DDS", "BLP", "EPS", "TGA", "PCX", "ICO", "ICNS", "SGI", "PPM", "JPEG2000", "SPIDER", "XBM", "MSP")


def _picture(mode: str = "RGB", size: tuple[int, int] = (24, 18)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    grey = np.asarray(_picture("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def _samples() -> dict[str, bytes]:
    """Real files: every format on the list in several kinds, and formats that are not on it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    known = {
        "jpeg": _saved("JPEG", exif=exif), "jpeg-progressive": _saved("JPEG", progressive=True),
        "jpeg-cmyk": _saved("JPEG", "CMYK"), "jpeg-mpo": _saved("MPO", save_all=True, append_images=[_picture()]),
        "png": _saved("PNG", "RGBA"), "png-palette": _saved("PNG", "P"),
        "png-16": _sixteen_bits(), "webp": _saved("WEBP", quality=80),
        "webp-lossless": _saved("WEBP", "RGBA", lossless=True), "bmp": _saved("BMP"), "gif": _saved("GIF"),
        "gif-moving": _saved("GIF", save_all=True, append_images=[_picture("L")]),
        "tiff": _saved("TIFF"), "tiff-lzw": _saved("TIFF", compression="tiff_lzw"),
        "tiff-jpeg": _saved("TIFF", compression="jpeg"), "avif": _saved("AVIF", quality=70),
    }  # fmt: skip
    modes = {"XBM": "1", "MSP": "1", "SPIDER": "F", "BLP": "P"}
    return known | {kind.lower(): _saved(kind, modes.get(kind, "RGB")) for kind in _FOREIGN}


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled or zeroed; most often in the header, which decoders trust most."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(min(len(changed), rng.choice((16, 64, 512, 1 << 20))))
        match rng.randrange(5):
            case 0 | 1:
                changed[place] = rng.randrange(256)
            case 2:
                changed[place : place + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 4))
            case 3:
                del changed[place : place + rng.randrange(1, 64)]
            case _:
                changed[place:place] = changed[place : place + rng.randrange(1, 64)]
        if not changed:
            break
    return bytes(changed)


def test_every_damage_is_an_image_error() -> None:
    rng = random.Random(0)
    samples = sorted(_samples().items())
    causes: Counter[str] = Counter()
    for number in range(100 * len(samples)):
        name, data = samples[number % len(samples)]
        try:
            pixels = images.decode(_damaged(data, rng), name)
        except images.ImageError as error:
            assert str(error).startswith(f"{name}: ")
            causes[type(error.__cause__).__name__] += 1
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            causes["none"] += 1
    # Some damage is fatal, some is harmless, and decoders fail in several ways.
    assert causes["none"] > 300 and len(causes) >= 5, causes


@pytest.mark.parametrize("name", [name for name in _samples() if name.upper() in _FOREIGN])
def test_other_formats_are_not_opened_whatever_their_file_names(name: str) -> None:
    with pytest.raises(images.ImageError, match=r"photo\.jpg: not a readable image \(none of JPEG, PNG"):
        images.decode(_samples()[name], "photo.jpg")


@pytest.mark.parametrize("name", [name for name in _samples() if name.upper() not in _FOREIGN])
def test_every_format_on_the_list_is_opened(name: str) -> None:
    shape = (24, 18, 3) if name == "jpeg" else (18, 24, 3)  # turned by its EXIF
    pixels = images.decode(_samples()[name], name)
    assert pixels.shape == shape
    assert images.header(_samples()[name])[:2] == (24, 18)
    if shape == (18, 24, 3) and name not in ("png", "webp-lossless"):
        assert np.abs(pixels.mean() - np.asarray(_picture()).mean()) < 16  # the picture, not black or white


def test_files_with_each_known_suffix_can_be_read() -> None:
    for suffix in images.SUFFIXES:
        buffer = io.BytesIO()
        _picture().save(buffer, Image.registered_extensions()[suffix])
        assert images.decode(buffer.getvalue()).shape == (18, 24, 3)


_EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 40
%%EndComments
0 0 moveto 40 40 lineto stroke
showpage
%%EOF
"""


def test_no_program_is_started_for_a_postscript_file_named_as_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, photos, started = tmp_path / "bin", tmp_path / "photos", tmp_path / "started"
    programs.mkdir()
    photos.mkdir()
    for name in ("gs", "gswin64c", "djpeg", "convert"):
        program = programs / name
        program.write_text(f"#!/bin/sh\necho {name} >> {started}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    found = {name: photos / name for name in ("photo.jpg", "photo.png", "photo.tif", "photo.gif")}
    for path in found.values():
        path.write_bytes(_EPS)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    # The trap works: Pillow starts the program if any format is allowed.
    with Image.open(found["photo.jpg"]) as image, pytest.raises(OSError):
        image.load()
    assert started.read_text().startswith("gs\n")
    started.unlink()

    for path in found.values():
        with pytest.raises(images.ImageError, match=r"not a readable image \(none of JPEG"):
            images.decode(path.read_bytes(), path.name)
    failed: dict[str, str] = {}
    assert not list(_readable(found, failed)) and set(failed) == set(found)  # vlv caption, vlv reconstruct
    with pytest.raises(DataError, match=r"none of 4 images can be used \{'unreadable': 4\}"):
        import_images(photos, tmp_path / "data", wanted())
    assert not started.exists()
