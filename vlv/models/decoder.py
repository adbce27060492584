"""The frozen text-to-image decoder: Stable Diffusion 1.x and 2.x behind a small interface.

`condition` turns caption embeddings into cross-attention context, `loss` asks the denoiser for one image's
noise given a context, `sample` draws. What it is trained to predict, its noise schedule and the scale of its
latents are read from the pretrained configurations; nothing is typed twice.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from vlv import draws, images
from vlv.config import Timesteps
from vlv.models.conditioner import TextConditioner


class StableDiffusionDecoder(nn.Module):
    """VAE, UNet, text side and noise schedule of one Stable Diffusion.

    Args:
        image_size: side of the square images it draws, pixels.
    """

    coordinates: torch.Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        conditioner: TextConditioner,
        scheduler: DDPMScheduler,
        *,
        image_size: int,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.conditioner = vae, unet, conditioner
        self.scheduler, self.image_size = scheduler, image_size
        # A VAE with 3 k^2 input channels takes k x k patches; Stable Diffusion's own has k = 1.
        self._patch = math.isqrt(vae.config.in_channels // 3)
        self._downscale: int = self._patch * 2 ** (len(vae.config.block_out_channels) - 1)
        latent = image_size // self._downscale
        self.latent_shape = (int(vae.config.latent_channels), latent, latent)
        extra = unet.config.in_channels - unet.config.out_channels
        self.register_buffer("coordinates", coordinate_channels(latent, extra), persistent=False)
        if not torch.cuda.is_available():
            # On a CPU the flash kernel's backward for small heads costs more than the plain products.
            unet.set_attn_processor(AttnProcessor())

    # -- text side -------------------------------------------------------------------------------------

    def condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> context (B, Q, C): see `TextConditioner.condition`."""
        return self.conditioner.condition(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> context (B, T, C)."""
        return self.conditioner.embed_text(prompts)

    # -- image side ------------------------------------------------------------------------------------

    def encode(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) uint8 -> mean and spread of the scaled latents, each (B, c, h, w)."""
        pixels = F.pixel_unshuffle(images.to_model(batch.to(self.unet.device)), self._patch)
        posterior = self.vae.encode(pixels).latent_dist
        shift, scale = self._latent_scale()
        return (posterior.mean - shift) * scale, posterior.std * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, c, h, w) -> images (B, 3, H, W) uint8."""
        shift, scale = self._latent_scale()
        drawn = self.vae.decode(latents / scale + shift).sample
        return images.to_pixels(F.pixel_shuffle(drawn, self._patch))

    def _latent_scale(self) -> tuple[float, float]:
        config = self.vae.config
        return config.get("shift_factor") or 0.0, config.scaling_factor

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or ()."""
        if self.coordinates.shape[1]:
            grid = self.coordinates.expand(len(noisy), -1, -1, -1)
            noisy = torch.cat([noisy, grid.to(noisy.dtype)], 1)
        prediction: torch.Tensor = self.unet(noisy, timesteps, context).sample
        return prediction

    def loss(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        generator: torch.Generator,
        timesteps: Timesteps,
        kind: str = "mse",
        same_noise: bool = False,
    ) -> torch.Tensor:
        """Denoising loss of each sample (B,): latents (B, c, h, w), context (B, T, C).

        Noise, timestep and target are the pretrained schedule's (epsilon or v; Ho et al. 2020, Salimans and
        Ho 2022), the average over channels and pixels is in float32.
        """
        count = len(latents)
        t = draw_timesteps(timesteps, count, self.scheduler.config.num_train_timesteps, generator)
        noise = (
            torch.randn(latents.shape[1:], generator=generator)
            if same_noise
            else draws.normal(latents.shape, generator)
        )
        noise = noise.to(latents).expand_as(latents)
        t = t.to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                target = noise
            case "v_prediction":
                target = self.scheduler.get_velocity(latents, noise, t)
            case other:
                raise ValueError(f"the scheduler's prediction_type {other!r} is not one this decoder can train")
        prediction = self.denoise(noisy, t, context).float()
        error = (prediction - target).abs() if kind == "l1" else (prediction - target).square()
        return error.flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, context: torch.Tensor, seeds: Sequence[int], steps: int, guidance: float) -> torch.Tensor:
        """Draw one image for each context: (B, T, C) -> (B, 3, H, W) uint8.

        DPM-Solver++ with classifier-free guidance against the empty prompt (none at guidance 1). Every image
        has a seed of its own, so that it does not depend on the batch it was drawn in.
        """
        sampler = DPMSolverMultistepScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        sampler.set_timesteps(steps, device=context.device)
        empty = self._empty_context(context) if guidance != 1.0 else None
        latents = torch.stack(
            [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(context.device)
        for t in sampler.timesteps:
            if empty is None:
                prediction = self.denoise(latents, t, context)
            else:
                both = self.denoise(torch.cat([latents, latents]), t, torch.cat([empty, context]))
                without, given = both.float().chunk(2)
                prediction = without + guidance * (given - without)
            latents = sampler.step(prediction.float(), t, latents).prev_sample
        return self.decode(latents)

    def _empty_context(self, context: torch.Tensor) -> torch.Tensor:
        """The empty prompt's context, cut or repeated at its end to the context's length."""
        empty = self.embed_text([""]).to(context.dtype)
        length = context.shape[1]
        if empty.shape[1] < length:
            empty = torch.cat([empty, empty[:, -1:].expand(-1, length - empty.shape[1], -1)], 1)
        return empty[:, :length].expand_as(context)


def draw_timesteps(settings: Timesteps, count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,) int64 on the generator's device.

    uniform: independent; stratified: one from each of as many equal slices of [0, total) as the batch has samples
    (over all processes and micro-batches), in random order; fixed: always the same. A share `high_noise_share` of
    them is drawn anew from [high_noise_from, total).
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
    else:
        t = torch.randint(total, (count,), generator=generator, device=device)
    if settings.high_noise_share:
        high = torch.randint(settings.high_noise_from, total, (count,), generator=generator, device=device)
        chosen = torch.rand(count, generator=generator, device=device) < settings.high_noise_share
        t = torch.where(chosen, high, t)
    return t


def coordinate_channels(size: int, count: int) -> torch.Tensor:
    """Constant input channels (1, count, size, size) that tell a UNet where it is.

    A UNet with more input than output channels gets them (as inpainting models get their mask): sine and
    cosine of x and y at `count / 4` octaves. Small UNets place objects much sooner with them; Stable
    Diffusion has none (count 0).
    """
    if count % 4:
        raise ValueError(f"a UNet with {count} extra input channels is not one this decoder knows")
    axis = (torch.arange(size) + 0.5) / size
    waves = [f(math.pi * 2**k * axis) for k in range(count // 4) for f in (torch.sin, torch.cos)]
    if not waves:
        return torch.empty(1, 0, size, size)
    stacked = torch.stack(waves)
    across = stacked[:, None, :].expand(-1, size, -1)
    down = stacked[:, :, None].expand(-1, -1, size)
    return torch.cat([across, down])[None].contiguous()
