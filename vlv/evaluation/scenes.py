"""Scenes that were read (from captions or pictures) counted against the scenes that were drawn."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vlv.scenes import Scene


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
    if len(read) != len(true) or not true:
        raise ValueError(f"{len(read)} scenes read, {len(true)} true")
    backgrounds = exact = found = named = there = placed = 0
    for seen, truth in zip(read, true, strict=True):
        backgrounds += seen.background == truth.background
        exact += seen == truth
        named += len(seen.objects)
        there += len(truth.objects)
        kinds = Counter(kind for _, kind in truth.objects) & Counter(kind for _, kind in seen.objects)
        found += kinds.total()
        placed += (Counter(truth.objects) & Counter(seen.objects)).total()
    return SceneScores(
        n=len(true),
        background_accuracy=backgrounds / len(true),
        object_recall=found / there,
        object_precision=found / named if named else 0.0,
        position_accuracy=placed / found if found else 0.0,
        exact_match=exact / len(true),
    )
