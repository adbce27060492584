"""Whether a model is better than its shuffled control: 95 % intervals of differences, by a paired bootstrap.

The control is the same output beside another image: what a model scores that does not look. Both are measured on the
same test samples, so samples are drawn, with replacement, and both sides are computed on each draw; the interval lies
between the 2.5th and 97.5th percentile of the differences (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13; paired as in Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004).
Samples count as independent of each other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (N, 2) float64, a row for each sample: numerator and denominator of a figure that is a ratio of sums over samples.
Terms = NDArray[np.float64]

KEY = "versus_shuffled"  # in metrics/evaluate.json, beside the figures that it is about
# Of five samples all five are better in 1 of 32 cases by chance alone, which is more than the 2.5 % on that side.
FEWEST = 6
_DRAWS = 2000
_SEED = 20250710
_AT_ONCE = 4_000_000  # samples drawn in one array: 32 MB


@dataclass(frozen=True)
class Interval:
    """A difference to a control, and the ends of its 95 % interval; `low` and `high` None: too few samples to tell."""

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


def means(values: NDArray[np.float64]) -> Terms:
    """The terms of a mean: `values` (N,) over one each."""
    return np.stack([values.astype(np.float64), np.ones(len(values))], axis=1)


def figure(terms: Terms) -> float:
    """The figure itself: sum of numerators / sum of denominators; 0 where there is nothing to divide by."""
    return float(_ratio(terms.sum(0)))


def difference(ours: Terms, control: Terms) -> Interval:
    """`ours` less `control`, both (N, 2) on the same N samples, rounded to four digits. Higher is better.

    Raises:
        ValueError: different numbers of samples, or none.
    """
    if ours.shape != control.shape or not len(ours):
        raise ValueError(f"{len(ours)} samples, {len(control)} of the control")
    found = round(figure(ours) - figure(control), 4)
    if len(ours) < FEWEST:
        return Interval(found, None, None)
    both = np.concatenate([ours, control], axis=1)
    sums = np.concatenate([weights @ both for weights in _draws(len(ours))])
    low, high = np.percentile(_ratio(sums[:, :2]) - _ratio(sums[:, 2:]), [2.5, 97.5])
    return Interval(found, round(float(low), 4), round(float(high), 4))


def versus(ours: Mapping[str, Terms], control: Mapping[str, Terms]) -> dict[str, Any]:
    """`difference` of each figure, as JSON."""
    return {name: difference(terms, control[name]).to_json() for name, terms in ours.items()}


def not_better(measured: Mapping[str, Any]) -> dict[str, str]:
    """Figures of metrics/evaluate.json that are not clearly better than shuffled, dotted key -> a sentence on it."""
    found: dict[str, str] = {}
    for part, values in measured.items():
        for name, interval in values.get(KEY, {}).items() if isinstance(values, dict) else ():
            if not interval["better"]:
                found[f"{part}.{name}"] = _sentence(values[name], interval)
    return found


def _sentence(value: float, interval: Mapping[str, Any]) -> str:
    control = value - interval["difference"]
    if interval["low"] is None:
        return f"{value:.3f}, shuffled {control:.3f}: fewer than {FEWEST} test samples are too few to tell"
    ends = f"{interval['low']:.3f} to {interval['high']:.3f}"
    return f"{value:.3f}, shuffled {control:.3f}: difference {interval['difference']:.3f}, 95 % interval {ends}"


def _draws(samples: int) -> Iterator[NDArray[np.float64]]:
    """How often each sample is in each of the draws: arrays (B, N) of `_DRAWS` rows in all, the same at each call."""
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
