"""Counts what is right in captions and pictures of emoji scenes: the module that `evaluate.counting` names."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlv.evaluation.intervals import Terms
from vlv.tiny import scenes
from vlv.tiny.recogniser import SceneRecogniser
from vlv.tiny.scenes import Scene


def truth_of(meta: Mapping[str, Any]) -> Scene | None:
    """The scene that a sample shows, from its JSON; None if that holds no scene."""
    return Scene.from_json(meta["scene"]) if "scene" in meta else None


def is_held_out(meta: Mapping[str, Any]) -> bool:
    """Whether the sample shows a pair of kinds that no training set shows."""
    return bool(meta["novel_pair"])


def read_captions(captions: Sequence[str]) -> list[Scene]:
    """The scenes that captions describe."""
    return [scenes.read_caption(caption) for caption in captions]


def load_judge(folder: Path) -> Callable[[torch.Tensor], list[Scene]]:
    """The recogniser in `folder`: pictures (N, 3, 64, 64) uint8 -> the scenes that they show."""
    return SceneRecogniser.load(folder).read


def terms(read: Sequence[Scene], true: Sequence[Scene]) -> dict[str, Terms]:
    """What was right and out of how many, (N, 2) over N scenes, for each count:

    - background_accuracy: scenes whose background is right
    - object_recall: true objects (by kind) that were named
    - object_precision: named objects that are there; unknown words and repetitions count as wrong
    - position_accuracy: of the objects that were found, those at their true place
    - exact_match: scenes whose background, objects and places are all right, with nothing more

    Raises:
        ValueError: the two differ in length, or there is nothing to compare.
    """
    if len(read) != len(true) or not true:
        raise ValueError(f"{len(read)} scenes read, {len(true)} true")
    rows: dict[str, list[tuple[int, int]]] = {}
    for seen, truth in zip(read, true, strict=True):
        found = (_kinds(truth) & _kinds(seen)).total()
        placed = (Counter(truth.objects) & Counter(seen.objects)).total()
        for name, counts in (
            ("background_accuracy", (seen.background == truth.background, 1)),
            ("object_recall", (found, len(truth.objects))),
            ("object_precision", (found, len(seen.objects))),
            ("position_accuracy", (placed, found)),
            ("exact_match", (seen == truth, 1)),
        ):
            rows.setdefault(name, []).append(counts)
    return {name: np.array(counts, dtype=np.float64) for name, counts in rows.items()}


def _kinds(scene: Scene) -> Counter[int]:
    return Counter(kind for _, kind in scene.objects)
