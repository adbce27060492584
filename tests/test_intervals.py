"""Intervals of differences to the shuffled baseline are as wide as they should be, and rarely wrong."""

import numpy as np
import pytest
from scipy import stats

from vlv.evaluation import intervals
from vlv.tiny import scenes
from vlv.tiny.counting import terms


def test_the_interval_is_that_of_an_independent_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(size=80)  # what both share; pairing removes it
    ours, control = image + rng.normal(0.3, 0.5, 80), image + rng.normal(0.0, 0.5, 80)
    found = intervals.difference(intervals.means(ours), intervals.means(control))
    theirs = stats.bootstrap(
        (ours, control), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True, vectorized=True,
        n_resamples=4000, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert found.difference == pytest.approx((ours - control).mean(), abs=1e-4)
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert found.better and found == intervals.difference(intervals.means(ours), intervals.means(control))


def test_chance_is_rarely_called_better() -> None:
    """Shares of rare hits, like those of a captioner that learned nothing: at most about 2.5 % are called better."""
    rng = np.random.default_rng(3)
    called = 0
    for _ in range(300):
        hits, control = (intervals.means((rng.random(60) < 0.1).astype(float)) for _ in range(2))
        called += intervals.difference(hits, control).better
    assert called <= 0.05 * 300


def test_a_model_that_always_says_the_same_is_not_better() -> None:
    read = [scenes.read_caption("The background is pink. A dog is at the center.")] * 40
    drawn = scenes.specifications("test", np.random.default_rng(0))
    true = [next(drawn) for _ in range(40)]
    versus = intervals.versus(terms(read, true), terms(intervals.shuffled(read), true))
    assert set(versus) == set(terms(read, true))
    assert not any(one["better"] for one in versus.values())
    assert all(one["difference"] == 0 for one in versus.values())
    own = intervals.versus(terms(true, true), terms(intervals.shuffled(true), true))
    assert all(one["better"] for one in own.values())


def test_figures_are_ratios_of_sums_over_the_drawn_samples() -> None:
    """Three of four objects found, in images of very different sizes: not the mean of the images' shares."""
    ours = np.array([[3.0, 3.0], [0.0, 1.0]] * 10)
    control = np.array([[0.0, 3.0], [0.0, 1.0]] * 10)
    assert intervals.figure(ours) == 0.75
    found = intervals.difference(ours, control)
    assert found.difference == 0.75 and found.low is not None and 0.5 < found.low < 0.75 < (found.high or 0) < 0.9
    nothing = np.zeros((10, 2))
    assert intervals.figure(nothing) == 0.0 and not intervals.difference(nothing, nothing).better


def test_too_few_samples_give_no_interval() -> None:
    few = intervals.difference(intervals.means(np.ones(5)), intervals.means(np.zeros(5)))
    assert (few.difference, few.low, few.high, few.better) == (1.0, None, None, False)
    assert intervals.difference(intervals.means(np.ones(6)), intervals.means(np.zeros(6))).better
    with pytest.raises(ValueError, match="5 samples, but 6 of the baseline"):
        intervals.difference(intervals.means(np.ones(5)), intervals.means(np.ones(6)))


def test_more_samples_than_are_drawn_at_once() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0.01, 0.5, 9000)
    found = intervals.difference(intervals.means(values), intervals.means(np.zeros(9000)))
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 9000**0.5, rel=0.06)


def test_figures_that_are_not_better_are_named() -> None:
    tie, ahead = ({"difference": d, "low": d - 0.01, "high": d + 0.01, "better": d > 0.01} for d in (0.0, 0.5))
    measured = {
        "profile": "photos",
        "captions": {"similarity": 0.1909, intervals.KEY: {"similarity": tie}},
        "reconstruction": {"psnr": 20.0, "guidance": 2.0, intervals.KEY: {"psnr": ahead}},
    }
    assert intervals.not_better(measured) == {
        "captions.similarity": "0.191, shuffled 0.191: difference 0.000, 95 % interval -0.010 to 0.010"
    }
