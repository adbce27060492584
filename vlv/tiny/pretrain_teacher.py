"""The tiny profile's text-to-image UNet, trained on captioned scenes with the frozen text encoder and VAE.

Latents and contexts are computed once. Single objects come first: placing one is learned in minutes, and three
at once hardly at all before it.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from vlv.config import Optimizer, Timesteps, Training
from vlv.io.progress import meter
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder
from vlv.tiny.pretrain_text import WIDTH
from vlv.tiny.scene_pool import Pool
from vlv.training import blocks, distributed, loop

log = logging.getLogger(__name__)

COORDINATES = 8
SETTINGS = Training(
    steps=6200, batch_size=16, precision="bf16", seed=13, checkpoint_every=500, log_every=100,
    optimizer=Optimizer(
        learning_rate=1e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=100,
        schedule="hold_then_linear", hold_share=0.5, final_rate_share=0.02, clip_norm=1.0, ema_decay=0.998,
    ),
)  # fmt: skip
TIMESTEPS = Timesteps(mode="uniform", high_noise_share=0.65, high_noise_from=600)
_EMPTY_SHARE = 0.1  # contexts replaced by the empty prompt's, for guidance
_CURRICULUM = (0.27, 0.75)  # in this first share of the steps, this share of batches shows single objects only


def build(latent_size: int = 16, channels: int = 4) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """The UNet with new weights, and its noise schedule (Stable Diffusion's, v-prediction)."""
    torch.manual_seed(SETTINGS.seed)
    unet = UNet2DConditionModel(
        sample_size=latent_size, in_channels=channels + COORDINATES, out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(64, 128), layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip
    return unet, scheduler


class _Denoising(nn.Module):
    """The decoder's own loss; only the UNet learns."""

    def __init__(self, decoder: StableDiffusionDecoder) -> None:
        super().__init__()
        self.unet = decoder.unet  # registered under its own name, so that parameters are named after it
        self._decoder = [decoder]  # in a list: not registered a second time

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        latents, context = batch
        return self._decoder[0].loss(latents, context, generator, TIMESTEPS).mean()


@torch.no_grad()
def contexts(decoder: StableDiffusionDecoder, captions: list[str]) -> torch.Tensor:
    """(N, T, C) bf16, computed once."""
    parts = []
    with meter("Contexts", len(captions)) as progress:
        for i in range(0, len(captions), 256):
            parts.append(decoder.embed_text(captions[i : i + 256]).bfloat16())
            progress.advance(len(parts[-1]))
    return torch.cat(parts)


@torch.no_grad()
def latents(decoder: StableDiffusionDecoder, pixels: torch.Tensor) -> torch.Tensor:
    """(N, c, h, w) means, computed once."""
    parts = []
    with meter("Latents", len(pixels)) as progress:
        for part in pixels.split(100):
            with blocks.autocast(torch.device("cpu"), "bf16"):
                parts.append(decoder.encode(part)[0].float())
            progress.advance(len(part))
    return torch.cat(parts)


def pretrain(decoder: StableDiffusionDecoder, pool: Pool, singles: Pool, folder: Path) -> None:
    """Train `decoder.unet` in `folder` (resumable), in place."""
    decoder.requires_grad_(False)
    context = torch.cat([contexts(decoder, pool.captions), contexts(decoder, singles.captions)])
    latent = torch.cat([latents(decoder, pool.pixels), latents(decoder, singles.pixels)])
    empty = contexts(decoder, [""])
    decoder.unet.requires_grad_(True)
    until, share = _CURRICULUM[0] * SETTINGS.steps, _CURRICULUM[1]

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            draw = distributed.generator(SETTINGS.seed, step, stream=1)
            easy = step < until and float(torch.rand((), generator=draw)) < share
            low, high = (len(pool), len(latent)) if easy else (0, len(latent) if step < until else len(pool))
            chosen = torch.randint(low, high, (SETTINGS.batch_size,), generator=draw)
            dropped = torch.rand(SETTINGS.batch_size, 1, 1, generator=draw) < _EMPTY_SHARE
            yield latent[chosen], torch.where(dropped, empty, context[chosen]).float()
            step += 1

    loop.train(_Denoising(decoder), batches, SETTINGS, folder, "unet-1", title="Teacher")
    decoder.requires_grad_(False)
