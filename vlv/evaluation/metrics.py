"""The table of metrics: what each figure of metrics/evaluate.json is called, how it is shown and how it is measured.

A new metric is one row of `METRICS`. The evaluation measures it, the tables and plots show it, `vlv models` lists it,
MLflow records it under its key, and mlflow/policy.yaml may set limits for it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.intervals import KEY, Terms, figure, means

if TYPE_CHECKING:  # readers of the table do not wait for torch
    import torch

    from vlv.io.images import Pixels

    Features = tuple[torch.Tensor, torch.Tensor]  # (N, 2048) each

Part = Literal["scenes", "captions", "reconstruction"]  # the sections of metrics/evaluate.json
PARTS: tuple[Part, ...] = ("scenes", "captions", "reconstruction")
BASELINES = "baselines"  # a part's figures for outputs that know less: name of the baseline -> figures
# Figures of a part's subset, or of other pictures of the same images, that stand beside the part's own.
UPPER_BOUND, VAE, HELD_OUT, SEEN, JUDGE = "upper_bound", "vae", "held_out_pairs", "seen_pairs", "judge_on_real_scenes"
SHARE_OF_UPPER_BOUND = "recall_of_upper_bound"


@dataclass(frozen=True)
class Compared:
    """The outputs of a model for N test samples, beside the true values.

    A metric whose fields are empty is not measured.

    Attributes:
        n: the number of samples, N.
        counts: what was right and out of how many, by name, (N, 2) each, where the truth is known.
        cosines: (N,) in [-1, 1], between the sentence embeddings of the written and of the true caption.
        drawn: N pictures (H, W, 3) uint8 that the model made.
        true: the N pictures that they should equal.
        features: Inception features (N, 2048) float64, of `drawn` and of `true`.
    """

    n: int
    counts: Mapping[str, Terms] = field(default_factory=dict)
    cosines: NDArray[np.float64] | None = None
    drawn: "Sequence[Pixels]" = ()
    true: "Sequence[Pixels]" = ()
    features: "Features | None" = None


# What a function measures: terms of each sample, so that the difference to a baseline has an interval; one number
# for the whole set; or None where it has nothing to measure.
# The interval (vlv/evaluation/intervals.py) takes higher for better, whatever the row's `better` says. Where lower is
# better, measure one number: a row with terms would be listed as not better than the shuffled baseline.
Measure = Callable[[Compared], Terms | float | None]


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        part: its section of metrics/evaluate.json.
        name: its name there.
        label: its name in tables and plots.
        measure: what computes it.
        unit: "" for shares in 0..1 and for pure numbers.
        digits: decimals in tables; metrics/evaluate.json holds one more.
        better: which direction is better.
        shown: in metrics/evaluate.json only, also in the tables of a run, or in `vlv models` too.
    """

    part: Part
    name: str
    label: str
    measure: Measure
    unit: str = ""
    digits: int = 3
    better: Literal["higher", "lower"] = "higher"
    shown: Literal["file", "tables", "models"] = "models"

    @property
    def key(self) -> str:
        """The dotted key in MLflow and in mlflow/policy.yaml, such as scenes.exact_match."""
        return f"{self.part}.{self.name}"

    @property
    def title(self) -> str:
        """Label and unit, as the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float) -> str:
        """A value with the decimals that tables show."""
        return f"{value:.{self.digits}f}"


def counted(name: str) -> Measure:
    """The count of this name (`Compared.counts`)."""
    return lambda compared: compared.counts.get(name)


def _similarity(compared: Compared) -> Terms | None:
    return None if compared.cosines is None else means(compared.cosines)


def _psnr(compared: Compared) -> Terms | None:
    return means(psnr_of_each(compared.drawn, compared.true)) if compared.drawn else None


def _fid(compared: Compared) -> float | None:
    from vlv.evaluation import fid

    return None if compared.features is None else fid.distance(*compared.features)


METRICS: tuple[Metric, ...] = (
    Metric("scenes", "background_accuracy", "background", counted("background_accuracy"), shown="tables"),
    Metric("scenes", "object_recall", "object recall", counted("object_recall")),
    Metric("scenes", "object_precision", "object precision", counted("object_precision"), shown="tables"),
    Metric("scenes", "position_accuracy", "position", counted("position_accuracy"), shown="tables"),
    Metric("scenes", "exact_match", "exact scene", counted("exact_match")),
    Metric("captions", "similarity", "cosine of sentence embeddings", _similarity),
    Metric("reconstruction", "background_accuracy", "background", counted("background_accuracy"), shown="file"),
    Metric("reconstruction", "object_recall", "object recall", counted("object_recall")),
    Metric("reconstruction", "object_precision", "object precision", counted("object_precision"), shown="file"),
    Metric("reconstruction", "position_accuracy", "position", counted("position_accuracy"), shown="file"),
    Metric("reconstruction", "exact_match", "exact scene", counted("exact_match"), shown="file"),
    Metric("reconstruction", "psnr", "PSNR", _psnr, unit="dB", digits=2),
    Metric("reconstruction", "fid", "FID", _fid, digits=2, better="lower"),
)


def of(part: Part, *shown: str) -> list[Metric]:
    """The rows of a part; with `shown`, those that are shown there."""
    return [row for row in METRICS if row.part == part and (not shown or row.shown in shown)]


def measure(part: Part, compared: Compared) -> dict[str, float]:
    """The figures of a part, rounded, with the number of samples `n`; figures without data are left out."""
    found: dict[str, float] = {"n": compared.n}
    for row in of(part):
        value = row.measure(compared)
        if value is not None:
            found[row.name] = round(value if isinstance(value, float) else figure(value), row.digits + 1)
    return found


def terms(part: Part, compared: Compared) -> dict[str, Terms]:
    """The terms of those figures of a part that are measured sample by sample."""
    found = {row.name: row.measure(compared) for row in of(part)}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def summary(figures: Mapping[str, float]) -> str:
    """The figures that `vlv models` lists, from figures by their dotted keys."""
    parts = []
    for part in PARTS:
        rows = [row for row in of(part, "models") if row.key in figures]
        told = ", ".join(f"{row.label} {row.text(figures[row.key])} {row.unit}".rstrip() for row in rows)
        parts += [f"{part}: {told}"] if told else []
    return "; ".join(parts)


def about(key: str) -> Metric | None:
    """The row that a dotted key of metrics/evaluate.json belongs to; None if there is no such figure.

    The key names the figure itself (reconstruction.psnr), the same figure of a baseline, an upper bound or a subset
    (reconstruction.upper_bound.object_recall), or an end of its interval (captions.versus_shuffled.similarity.low).
    """
    beside = rf"(?:{BASELINES}\.\w+|{UPPER_BOUND}|{VAE}|{HELD_OUT}|{SEEN}|{JUDGE})\."
    interval = rf"{KEY}\.(?P<compared>\w+)\.(?:difference|low|high)"
    found = re.fullmatch(rf"(?P<part>\w+)\.(?:{interval}|(?:{beside})?(?P<own>\w+))", key)
    wanted = found and (found["part"], found["compared"] or found["own"])
    return next((row for row in METRICS if (row.part, row.name) == wanted), None)


def psnr_of_each(drawn: "Sequence[Pixels]", true: "Sequence[Pixels]") -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, (N,), of N pairs of (H, W, 3) uint8; equal images count as 100 dB."""
    values = []
    for a, b in zip(drawn, true, strict=True):
        error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        values.append(100.0 if error == 0 else min(100.0, 10 * np.log10(255**2 / error)))
    return np.array(values)
