"""Scenes for pretraining the tiny parts. They are drawn from specifications of the training split only."""

from dataclasses import dataclass

import numpy as np
import torch

from vlv.config import Paths, ScenesSource
from vlv.io import assets, images
from vlv.tiny import scenes
from vlv.training import distributed

# The pretraining draws from random streams of its own, so its scenes are not those of data/.
_STREAM = 7_100_000


@dataclass(frozen=True)
class Pool:
    """N scenes: specifications, captions and pixels (N, 3, 64, 64) uint8 (no pictures if only text was asked for)."""

    scenes: list[scenes.Scene]
    captions: list[str]
    pixels: torch.Tensor

    def __len__(self) -> int:
        return len(self.scenes)


def draw(
    paths: Paths,
    source: ScenesSource,
    count: int,
    stream: int,
    split: scenes.Split = "train",
    max_objects: int = 3,
    pixels: bool = True,
) -> Pool:
    """Draw `count` scenes of a split, with a random stream of its own for each number `stream`."""
    rng = np.random.default_rng([source.seed, _STREAM + stream])
    drawn = scenes.specifications(split, rng, max_objects, unique=split != "train")
    specifications = [next(drawn) for _ in range(count)]
    captions = [scenes.write_caption(scene, rng) for scene in specifications]
    batch = torch.empty(0, 3, scenes.SIZE, scenes.SIZE, dtype=torch.uint8)
    if pixels:
        painter = scenes.Painter(assets.resolve(source.sprites, paths))
        batch = images.to_batch([painter.draw(scene, rng) for scene in specifications])
    return Pool(specifications, captions, batch)


def indices(count: int, batch: int, seed: int, step: int) -> torch.Tensor:
    """The samples that step `step` takes, out of `count`: (batch,) int64, with replacement."""
    return torch.randint(count, (batch,), generator=distributed.generator(seed, step, stream=1))
