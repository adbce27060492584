"""Trains the judge of reconstructions (vlv.tiny.recogniser) on real scenes with a little noise."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlv.config import Optimizer, Training
from vlv.io import images
from vlv.tiny import scenes
from vlv.tiny.recogniser import SceneRecogniser
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import loop

SETTINGS = Training(
    steps=900, batch_size=48, precision="bf16", seed=14, checkpoint_every=200, log_every=50,
    optimizer=Optimizer(
        learning_rate=2e-3, betas=[0.9, 0.999], weight_decay=0.01, warmup_steps=30,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.01, clip_norm=10.0,
    ),
)  # fmt: skip


class _Objective(nn.Module):
    def __init__(self, model: SceneRecogniser) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        pixels, background, cells = batch
        x = images.to_model(pixels)
        # Reconstructions are a little noisy; the judge must read objects, not the lack of noise.
        strength = 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator).abs()
        seen_background, seen_cells = self.model(x + strength * torch.randn(x.shape, generator=generator))
        return F.cross_entropy(seen_background.float(), background) + 2 * F.cross_entropy(
            seen_cells.float().flatten(0, 1), cells.flatten()
        )


def pretrain(pool: Pool, held_out: Pool, folder: Path) -> tuple[SceneRecogniser, dict[str, float]]:
    """Train in `folder`; figures: held-out scenes read exactly."""
    torch.manual_seed(SETTINGS.seed)
    model = SceneRecogniser()
    backgrounds, cells = (torch.from_numpy(np.asarray(a)) for a in scenes.targets(pool.scenes))

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), SETTINGS.batch_size, SETTINGS.seed, step)
            yield pool.pixels[chosen], backgrounds[chosen], cells[chosen]
            step += 1

    model.train()
    loop.train(_Objective(model), batches, SETTINGS, folder, "recogniser-1", title="Recogniser")
    right = [a == b for a, b in zip(model.read(held_out.pixels), held_out.scenes, strict=True)]
    return model, {"scenes_exact": round(float(np.mean(right)), 4)}
