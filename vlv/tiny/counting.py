"""Scenes that were read (from captions or pictures) counted against the scenes that were drawn."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vlv.evaluation.intervals import Terms, figure
from vlv.tiny.scenes import Scene


@dataclass(frozen=True)
class SceneScores:
    """Shares in 0..1 over `n` scenes.

    Attributes:
        background_accuracy: scenes whose background is right.
        object_recall: true objects (by kind) that were named.
        object_precision: named objects that are there; unknown words and repetitions count as wrong.
        position_accuracy: of the objects found, those at their true place.
        exact_match: scenes whose background, objects and places are all right, with nothing more.
    """

    n: int
    background_accuracy: float
    object_recall: float
    object_precision: float
    position_accuracy: float
    exact_match: float

    def to_json(self) -> dict[str, float]:
        """Rounded to four digits."""
        return {name: value if name == "n" else round(value, 4) for name, value in asdict(self).items()}


def score(read: Sequence[Scene], true: Sequence[Scene]) -> SceneScores:
    """Compare scene by scene.

    Raises:
        ValueError: different lengths, or nothing to compare.
    """
    counted = terms(read, true)
    return SceneScores(n=len(true), **{name: figure(values) for name, values in counted.items()})


def terms(read: Sequence[Scene], true: Sequence[Scene]) -> dict[str, Terms]:
    """Each figure of `SceneScores` as what was right and out of how many, (N, 2) over the N scenes.

    Raises:
        ValueError: different lengths, or nothing to compare.
    """
    if len(read) != len(true) or not true:
        raise ValueError(f"{len(read)} scenes read, {len(true)} true")
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in SceneScores.__dataclass_fields__ if name != "n"}
    for seen, truth in zip(read, true, strict=True):
        kinds = Counter(kind for _, kind in truth.objects) & Counter(kind for _, kind in seen.objects)
        found = kinds.total()
        rows["background_accuracy"].append((seen.background == truth.background, 1))
        rows["object_recall"].append((found, len(truth.objects)))
        rows["object_precision"].append((found, len(seen.objects)))
        rows["position_accuracy"].append(((Counter(truth.objects) & Counter(seen.objects)).total(), found))
        rows["exact_match"].append((seen == truth, 1))
    return {name: np.array(counts, dtype=np.float64) for name, counts in rows.items()}
