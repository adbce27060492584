"""The tiny profile's text-to-image model: a VAE on scenes, then a UNet on its latents and captions' contexts.

The VAE is an AutoencoderKL, 64x64x3 pixels to 16x16x4 latents. It takes 2x2 patches as 12 channels (as in_channels
says), because convolutions with few channels on many pixels are slow on a CPU. After training, the mean and std of the
latents are folded into the quantisation convolutions, so that the stock class with scaling_factor 1 gives latents of
mean 0 and variance 1.

The UNet learns captioned scenes with the frozen text encoder and VAE; latents and contexts are computed once. Single
objects come first: placing one object is learned in minutes, and without it three at once are hardly learned at all.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from vlv.config import Optimizer, Timesteps, Training
from vlv.io import images
from vlv.io.progress import meter
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder
from vlv.tiny.pretrain_text import WIDTH
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import blocks, distributed, loop

PATCH = 2
VAE = Training(
    steps=4000, batch_size=16, precision="bf16", seed=11, checkpoint_every=500, log_every=100,
    optimizer=Optimizer(
        learning_rate=2e-3, betas=[0.9, 0.99], weight_decay=0.0, warmup_steps=50,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.02, clip_norm=1.0,
    ),
)  # fmt: skip


def build_vae() -> AutoencoderKL:
    """The architecture with new weights."""
    torch.manual_seed(VAE.seed)
    return AutoencoderKL(
        in_channels=3 * PATCH**2, out_channels=3 * PATCH**2, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


class _RoundTrip(nn.Module):
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
    """Fold the latents' per-channel mean and std into quant_conv and post_quant_conv, exactly.

    The posterior's mean is shifted and scaled, its log-variance shifted by -2 log(std); decoding undoes it.
    """
    mean = torch.cat(
        [vae.encode(F.pixel_unshuffle(images.to_model(p), PATCH)).latent_dist.mean for p in pixels.split(100)]
    )
    shift, std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels = len(shift)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] /= std[:, None, None, None]
    bias[:channels].sub_(shift).div_(std)
    bias[channels:] -= 2 * std.log()
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= std[None, :, None, None]


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


def pretrain_vae(pool: Pool, held_out: Pool, folder: Path) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train in `folder` (resumable); returns the model with unit latents, and its figures."""
    vae = build_vae()

    def batches(start: int) -> Iterator[torch.Tensor]:
        step = start
        while True:
            yield pool.pixels[indices(len(pool), VAE.batch_size, VAE.seed, step)]
            step += 1

    loop.train(_RoundTrip(vae), batches, VAE, folder, "vae-1", title="VAE")
    vae.eval()
    normalise(vae, pool.pixels[:2000])
    return vae, {"psnr_db": round(psnr(vae, held_out.pixels), 2)}


# -- UNet ----------------------------------------------------------------------------------------------

COORDINATES = 8
UNET = Training(
    steps=6200, batch_size=16, precision="bf16", seed=13, checkpoint_every=500, log_every=100,
    optimizer=Optimizer(
        learning_rate=1e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=100,
        schedule="hold_then_linear", hold_share=0.5, final_rate_share=0.02, clip_norm=1.0, ema_decay=0.998,
    ),
)  # fmt: skip
TIMESTEPS = Timesteps(mode="uniform", high_noise_share=0.65, high_noise_from=600)
_EMPTY_SHARE = 0.1  # contexts replaced by the empty prompt's, for guidance
_CURRICULUM = (0.27, 0.75)  # in this first share of the steps, this share of batches shows single objects only


def build_unet(latent_size: int = 16, channels: int = 4) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """The UNet with new weights, and its noise schedule (Stable Diffusion's, v-prediction)."""
    torch.manual_seed(UNET.seed)
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


def pretrain_unet(decoder: StableDiffusionDecoder, pool: Pool, singles: Pool, folder: Path) -> None:
    """Train `decoder.unet` in `folder` (resumable), in place."""
    decoder.requires_grad_(False)
    context = torch.cat([contexts(decoder, pool.captions), contexts(decoder, singles.captions)])
    latent = torch.cat([latents(decoder, pool.pixels), latents(decoder, singles.pixels)])
    empty = contexts(decoder, [""])
    decoder.unet.requires_grad_(True)
    until, share = _CURRICULUM[0] * UNET.steps, _CURRICULUM[1]

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            draw = distributed.generator(UNET.seed, step, stream=1)
            easy = step < until and float(torch.rand((), generator=draw)) < share
            low, high = (len(pool), len(latent)) if easy else (0, len(latent) if step < until else len(pool))
            chosen = torch.randint(low, high, (UNET.batch_size,), generator=draw)
            dropped = torch.rand(UNET.batch_size, 1, 1, generator=draw) < _EMPTY_SHARE
            yield latent[chosen], torch.where(dropped, empty, context[chosen]).float()
            step += 1

    loop.train(_Denoising(decoder), batches, UNET, folder, "unet-1", title="Teacher")
    decoder.requires_grad_(False)
