"""Which timesteps a training draws."""

import torch

from vlv import rng as draws
from vlv.config import Timesteps


def draw_timesteps(settings: Timesteps, count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,) int64 in [0, total) on the generator's device; the higher, the noisier.

    uniform: independent; stratified: one from each of as many equal slices of [0, total) as the batch has samples
    (over all processes and micro-batches), in random order; logit_normal: `total` times the sigmoid of a standard
    normal (Esser et al. 2024, arXiv 2403.03206); fixed: always the same. A share `high_noise_share` of them is drawn
    anew from [high_noise_from, total).
    """
    return draws.rows(count, generator, lambda n: _timesteps(settings, n, total, generator))


def _timesteps(settings: Timesteps, count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if settings.mode == "fixed":
        return torch.full((count,), settings.fixed, device=device)
    if settings.mode == "stratified":
        order = torch.randperm(count, generator=generator, device=device)
        offset = torch.rand(count, generator=generator, device=device)
        t = ((order + offset) * total / count).long().clamp(max=total - 1)
    elif settings.mode == "logit_normal":
        share = torch.randn(count, generator=generator, device=device).sigmoid()
        t = (share * total).long().clamp(max=total - 1)
    else:
        t = torch.randint(total, (count,), generator=generator, device=device)
    if settings.high_noise_share:
        high = torch.randint(settings.high_noise_from, total, (count,), generator=generator, device=device)
        chosen = torch.rand(count, generator=generator, device=device) < settings.high_noise_share
        t = torch.where(chosen, high, t)
    return t
