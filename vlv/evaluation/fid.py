"""Frechet distance between two sets of images (FID, Heusel et al. 2017) on the 2015 Inception network."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import _compute_fid

from vlv.io import images
from vlv.io.images import Pixels
from vlv.io.progress import meter

log = logging.getLogger(__name__)


def load_network(path: Path, device: torch.device | None = None) -> nn.Module:
    """The Inception network as TorchScript, on `device` (CPU): (B, 3, 299, 299) in [-1, 1) -> features (B, 2048).

    TorchScript is compiled code, not a pickle; the file's wheel is checked by its hash before it is opened.
    """
    network: nn.Module = torch.jit.load(str(path), map_location=device or "cpu")  # type: ignore[no-untyped-call]
    return network.eval()


@torch.no_grad()
def features(network: nn.Module, pictures: Sequence[Pixels], batch_size: int = 25) -> torch.Tensor:
    """Features (N, 2048) float64 of (H, W, 3) uint8 pictures."""
    parts = []
    device = next(network.parameters()).device
    with meter("Inception features", len(pictures)) as progress:
        for i in range(0, len(pictures), batch_size):
            batch = images.to_batch(pictures[i : i + batch_size]).to(device)
            # The network's own input, as in the original: bilinear to 299 pixels, then (x - 128) / 128.
            resized = F.interpolate(batch.float(), (299, 299), mode="bilinear", align_corners=False)
            parts.append(network((resized - 128) / 128).flatten(1).cpu().double())
            progress.advance(len(batch))
    return torch.cat(parts)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of two Gaussians fitted to features (N, F) and (M, F).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), covariances with N - 1. With fewer
    samples than features the value depends on their number: compare it only with distances of as many samples.

    Raises:
        ValueError: fewer than two samples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs two samples of each, not {len(a)} and {len(b)}")
    value = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    return max(0.0, float(np.asarray(value)))
