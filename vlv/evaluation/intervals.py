"""Whether a model is better than the shuffled baseline: 95 % intervals of differences, by a paired bootstrap.

The shuffled baseline is the same outputs, each beside the image of another sample: a model that ignores its image
scores no more. Both sides are measured on the same test samples. So samples are drawn with replacement, and both sides
are computed on each draw; the interval reaches from the 2.5th to the 97.5th percentile of the differences (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; paired as in Koehn, Statistical Significance Tests for
Machine Translation Evaluation, EMNLP 2004). Samples count as independent of each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

# (N, 2) float64, one row for each sample: the figure is the sum of column 0 divided by the sum of column 1.
Terms = NDArray[np.float64]
T = TypeVar("T")

KEY = "versus_shuffled"  # in metrics/evaluate.json, beside the figures that it is about
# Of five samples all five are better by chance in 1 of 32 cases, more than the 2.5 % beyond that end of the interval.
FEWEST = 6
_DRAWS = 2000
_SEED = 20250710
_AT_ONCE = 4_000_000  # samples drawn in one array: 32 MB


@dataclass(frozen=True)
class Interval:
    """A difference to a baseline and the ends of its 95 % interval; None for both ends: too few samples to tell."""

    difference: float
    low: float | None
    high: float | None

    @property
    def better(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low is not None and self.low > 0

    def to_json(self) -> dict[str, float | bool | None]:
        """As it stands in metrics/evaluate.json."""
        return {"difference": self.difference, "low": self.low, "high": self.high, "better": self.better}


def shuffled(outputs: Sequence[T]) -> list[T]:
    """The same outputs, each beside another sample: sample i gets that of sample i + 1, the last that of the first."""
    return [*outputs[1:], *outputs[:1]]


def means(values: NDArray[np.float64]) -> Terms:
    """The terms of the mean of `values` (N,)."""
    return np.stack([values.astype(np.float64), np.ones(len(values))], axis=1)


def figure(terms: Terms) -> float:
    """The figure: the sum of the numerators / the sum of the denominators; 0 where the denominators sum to 0."""
    return float(_ratio(terms.sum(0)))


def difference(ours: Terms, baseline: Terms) -> Interval:
    """`ours` minus `baseline`, both (N, 2) on the same N samples, rounded to four digits. Higher is better.

    Raises:
        ValueError: different numbers of samples, or none.
    """
    if ours.shape != baseline.shape or not len(ours):
        raise ValueError(f"{len(ours)} samples, but {len(baseline)} of the baseline")
    found = round(figure(ours) - figure(baseline), 4)
    if len(ours) < FEWEST:
        return Interval(found, None, None)
    both = np.concatenate([ours, baseline], axis=1)
    sums = np.concatenate([weights @ both for weights in _draws(len(ours))])
    low, high = np.percentile(_ratio(sums[:, :2]) - _ratio(sums[:, 2:]), [2.5, 97.5])
    return Interval(found, round(float(low), 4), round(float(high), 4))


def versus(ours: Mapping[str, Terms], baseline: Mapping[str, Terms]) -> dict[str, Any]:
    """`difference` of each figure, as JSON."""
    return {name: difference(terms, baseline[name]).to_json() for name, terms in ours.items()}


def not_better(measured: Mapping[str, Any]) -> dict[str, str]:
    """Figures of metrics/evaluate.json that are not clearly better than shuffled: dotted key -> a sentence on it."""
    found: dict[str, str] = {}
    for part, values in measured.items():
        for name, interval in values.get(KEY, {}).items() if isinstance(values, dict) else ():
            if not interval["better"]:
                found[f"{part}.{name}"] = _sentence(values[name], interval)
    return found


def _sentence(value: float, interval: Mapping[str, Any]) -> str:
    baseline = value - interval["difference"]
    if interval["low"] is None:
        return f"{value:.3f}, shuffled {baseline:.3f}: fewer than {FEWEST} test samples are too few to tell"
    ends = f"{interval['low']:.3f} to {interval['high']:.3f}"
    return f"{value:.3f}, shuffled {baseline:.3f}: difference {interval['difference']:.3f}, 95 % interval {ends}"


def _draws(samples: int) -> Iterator[NDArray[np.float64]]:
    """How often each sample was drawn: arrays (B, N), together `_DRAWS` rows, the same at each call."""
    rng = np.random.default_rng(_SEED)
    left, most = _DRAWS, max(1, _AT_ONCE // samples)
    while left:
        rows = min(left, most)
        drawn = rng.integers(samples, size=(rows, samples)) + samples * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)
        left -= rows


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numerators / denominators (..., 2) -> (...); 0 where the denominator is."""
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
