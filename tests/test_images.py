"""Pixels: the only place where a range changes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlv.io import images


def test_all_256_values_survive_the_round_trip_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(images.to_pixels(images.to_model(values)), values)
    assert images.to_model(values).min() == -1 and images.to_model(values).max() == 1


def test_png_is_lossless_and_repeats_to_the_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = images.encode_png(pixels)
    assert data == images.encode_png(pixels.copy())
    assert np.array_equal(images.decode(data), pixels)


def test_decode_turns_by_exif_and_lays_transparency_on_white() -> None:
    buffer = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # turn right
    Image.new("RGB", (4, 2), "red").save(buffer, "JPEG", exif=turned)
    assert images.decode(buffer.getvalue()).shape == (4, 2, 3)
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    assert images.decode(buffer.getvalue()).min() == 255


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_image_is_named(damage: str) -> None:
    whole = images.encode_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = {"empty": b"", "text": b"not an image", "cut": whole[: len(whole) // 2]}[damage]
    with pytest.raises(images.ImageError, match=r"holiday\.png"):
        images.decode(data, "holiday.png")
