"""How near reconstructions are to their images, pixel by pixel."""

from collections.abc import Sequence

import numpy as np

from vlv.images import Pixels


def psnr(drawn: Sequence[Pixels], true: Sequence[Pixels]) -> float:
    """Mean peak signal-to-noise ratio in dB over pairs of (H, W, 3) uint8; equal images count as 100 dB."""
    values = []
    for a, b in zip(drawn, true, strict=True):
        error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        values.append(100.0 if error == 0 else min(100.0, 10 * np.log10(255**2 / error)))
    return float(np.mean(values))
