"""The criteria for a row of a LAION metadata table. A row that fails is counted under the first reason that applies."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlv.data.shards import DataError

# Our name of a column -> its names in LAION's tables, in lower case.
COLUMNS = {
    "URL": ("url",),
    "TEXT": ("text", "caption"),
    "WIDTH": ("width", "original_width"),
    "HEIGHT": ("height", "original_height"),
    "pwatermark": ("pwatermark",),
    "punsafe": ("punsafe",),
    "similarity": ("similarity",),
    "hash": ("hash",),
    "aesthetic": ("aesthetic", "aesthetic_score", "prediction"),
}
_NEEDED = ("URL", "TEXT", "WIDTH", "HEIGHT", "pwatermark")
SCHEMA = pa.schema(
    [("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int64()), ("HEIGHT", pa.int64())]
    + [(name, pa.float64()) for name in ("pwatermark", "punsafe", "similarity")]
    + [("hash", pa.int64()), ("aesthetic", pa.float64())]
)


@dataclass(frozen=True)
class Criteria:
    """The paper's selection from LAION-2B-en-aesthetic (arXiv 2507.07104). `unsafe_below` is not in the paper.

    A row is dropped for one of these reasons: `no_url`; `size_unknown`; `too_small`: the shorter side is not above
    `side_above` pixels; `aspect`: width / height is below `aspect_low` or above `aspect_high`; `watermark_unknown`;
    `watermark`: the probability of a watermark is not below `watermark_below`; `unsafe`: the probability of unsafe
    content is unknown or not below `unsafe_below` (None: this is not checked).
    """

    side_above: int = 512
    aspect_low: float = 0.5
    aspect_high: float = 2.0
    watermark_below: float = 0.5
    unsafe_below: float | None = None


def columns(names: list[str], where: str, criteria: Criteria) -> dict[str, str]:
    """Our column names -> the table's.

    Raises:
        DataError: one that is needed is missing; the message lists what there is.
    """
    lower = {name.lower(): name for name in reversed(names)}
    found = {ours: next((lower[one] for one in theirs if one in lower), None) for ours, theirs in COLUMNS.items()}
    needed = [*_NEEDED, *(["punsafe"] if criteria.unsafe_below is not None else [])]
    missing = [name for name in needed if found[name] is None]
    if missing:
        raise DataError(
            f"{where} lacks the column {', '.join(missing)}; it has: {', '.join(names)}. The tables of "
            "LAION-2B-en-aesthetic have URL, TEXT, WIDTH, HEIGHT, similarity, hash, punsafe, pwatermark, aesthetic."
        )
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def filter_rows(table: pa.Table, criteria: Criteria, dropped: Counter[str]) -> pa.Table:
    """The rows of a table (columns of `SCHEMA`) that meet the criteria; `dropped` counts the others by reason."""
    width, height = _numbers(table, "WIDTH"), _numbers(table, "HEIGHT")
    watermark, unsafe = _numbers(table, "pwatermark"), _numbers(table, "punsafe")
    with np.errstate(divide="ignore", invalid="ignore"):
        aspect = width / height
    tests = {
        "no_url": ~np.asarray(pc.fill_null(pc.match_substring_regex(table["URL"], "^https?://"), False)),
        "size_unknown": ~((width > 0) & (height > 0)),
        "too_small": ~(np.minimum(width, height) > criteria.side_above),
        "aspect": ~((aspect >= criteria.aspect_low) & (aspect <= criteria.aspect_high)),
        "watermark_unknown": np.isnan(watermark),
        "watermark": ~(watermark < criteria.watermark_below),
    }
    if criteria.unsafe_below is not None:
        tests["unsafe"] = ~(unsafe < criteria.unsafe_below)
    passed = np.ones(len(table), bool)
    for reason, fails in tests.items():
        dropped[reason] += int((passed & fails).sum())
        passed &= ~fails
    return table.filter(pa.array(passed))


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as float64, NaN where it is missing."""
    return np.asarray(pc.fill_null(table[name].cast(pa.float64()), float("nan")))
