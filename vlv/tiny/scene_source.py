"""Emoji scenes as a data source (vlv.data.sources): drawn on the spot, each with its caption and its truth."""

from collections.abc import Iterator
from typing import get_args

import numpy as np

from vlv import config
from vlv.data.sources import Drawn
from vlv.data.writer import Progress, Record
from vlv.io import assets, images
from vlv.tiny import scenes

# Raise it when vlv.tiny.scenes draws or writes differently: data made before is then made again.
VERSION = 1


def draw(wanted: config.Data, paths: config.Paths, progress: Progress | None = None) -> Drawn:
    """The splits that `wanted.source` asks for; each is drawn when its records are read.

    Raises:
        AssetError: the sprites cannot be fetched.
    """
    source = wanted.source
    assert isinstance(source, config.ScenesSource)
    sprites = assets.resolve(source.sprites, paths)
    painter = scenes.Painter(sprites)
    splits: dict[str, Iterator[Record]] = {}
    for index, split in enumerate(get_args(scenes.Split)):
        rng = np.random.default_rng([source.seed, index])
        splits[split] = _records(split, getattr(source, split), rng, painter, wanted, progress)
    return Drawn(splits, {"sprites_sha256": assets.describe(source.sprites, sprites)["sha256"]})


def _records(
    split: scenes.Split,
    count: int,
    rng: np.random.Generator,
    painter: scenes.Painter,
    wanted: config.Data,
    progress: Progress | None,
) -> Iterator[Record]:
    """`count` scenes of different specifications; a smaller count gives the first scenes of a larger one."""
    drawn = scenes.specifications(split, rng, unique=True)
    for number in range(count):
        scene = next(drawn)
        pixels = images.resize_crop(painter.draw(scene, rng), wanted.image_size, wanted.resize)
        height, width = pixels.shape[:2]
        yield Record(
            url=f"scene:{split}/{number}",
            image=images.encode_png(pixels),
            caption=scenes.write_caption(scene, rng),
            width=width,
            height=height,
            original_width=scenes.SIZE,
            original_height=scenes.SIZE,
            mode="RGB",
            meta={"scene": scene.to_json(), "novel_pair": scenes.has_held_out_pair(scene)},
        )
        if progress is not None and ((number + 1) % 500 == 0 or number + 1 == count):
            progress(split, number + 1, count)
