"""How near reconstructions are to their images, pixel by pixel."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlv.io.images import Pixels


def psnr(drawn: Sequence[Pixels], true: Sequence[Pixels]) -> float:
    """Mean peak signal-to-noise ratio in dB over pairs of (H, W, 3) uint8; equal images count as 100 dB."""
    return float(np.mean(psnr_of_each(drawn, true)))


def psnr_of_each(drawn: Sequence[Pixels], true: Sequence[Pixels]) -> NDArray[np.float64]:
    """The same for each of N pairs, as (N,)."""
    values = []
    for a, b in zip(drawn, true, strict=True):
        error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        values.append(100.0 if error == 0 else min(100.0, 10 * np.log10(255**2 / error)))
    return np.array(values)
