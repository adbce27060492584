"""The tiny profile's VAE: an AutoencoderKL on scenes, 64x64x3 pixels to 16x16x4 latents.

It takes 2x2 patches as 12 channels (as in_channels says), because convolutions with few channels on many
pixels are slow on a CPU. After training, the latents' mean and spread are folded into the quantisation
convolutions, so that the stock class with scaling_factor 1 gives latents of mean 0 and variance 1.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from vlv.config import Optimizer, Training
from vlv.io import images
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import loop

log = logging.getLogger(__name__)

PATCH = 2
SETTINGS = Training(
    steps=4000, batch_size=16, precision="bf16", seed=11, checkpoint_every=500, log_every=100,
    optimizer=Optimizer(
        learning_rate=2e-3, betas=[0.9, 0.99], weight_decay=0.0, warmup_steps=50,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.02, clip_norm=1.0,
    ),
)  # fmt: skip


def build() -> AutoencoderKL:
    """The architecture with new weights."""
    torch.manual_seed(SETTINGS.seed)
    return AutoencoderKL(
        in_channels=3 * PATCH**2, out_channels=3 * PATCH**2, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


class _Objective(nn.Module):
    """L1 + 2 MSE of the pixels + 2e-4 KL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = F.pixel_unshuffle(images.to_model(batch), PATCH)
        posterior = self.vae.encode(x).latent_dist
        drawn = self.vae.decode(posterior.sample(generator)).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss: torch.Tensor = F.l1_loss(drawn, x) + 2 * F.mse_loss(drawn, x) + 2e-4 * kl
        return loss


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold the latents' per-channel mean and spread into quant_conv and post_quant_conv, exactly.

    The posterior's mean is shifted and scaled, its log-variance shifted by -2 log(spread); decoding undoes it.
    """
    mean = torch.cat(
        [vae.encode(F.pixel_unshuffle(images.to_model(p), PATCH)).latent_dist.mean for p in pixels.split(100)]
    )
    shift, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels = len(shift)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] /= spread[:, None, None, None]
    bias[:channels].sub_(shift).div_(spread)
    bias[channels:] -= 2 * spread.log()
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= spread[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB of the round trip (posterior mean), pixels (N, 3, 64, 64) uint8."""
    values = []
    for part in pixels.split(100):
        x = F.pixel_unshuffle(images.to_model(part), PATCH)
        back = images.to_pixels(F.pixel_shuffle(vae.decode(vae.encode(x).latent_dist.mean).sample, PATCH))
        error = (back.float() - part.float()).square().mean((1, 2, 3))
        values.append(10 * (255**2 / error).log10())
    return float(torch.cat(values).mean())


def pretrain(pool: Pool, held_out: Pool, folder: Path) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train in `folder` (resumable); returns the model with unit latents, and its figures."""
    vae = build()

    def batches(start: int) -> Iterator[torch.Tensor]:
        step = start
        while True:
            yield pool.pixels[indices(len(pool), SETTINGS.batch_size, SETTINGS.seed, step)]
            step += 1

    loop.train(_Objective(vae), batches, SETTINGS, folder, "vae-1", title="VAE")
    vae.eval()
    normalise(vae, pool.pixels[:2000])
    return vae, {"psnr_db": round(psnr(vae, held_out.pixels), 2)}
