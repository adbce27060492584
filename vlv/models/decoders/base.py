"""The frozen text-to-image decoder: the small interface that all kinds share.

`condition` turns caption embeddings into what the denoiser is conditioned on, `loss` asks the denoiser for one
image's noise given that context, `sample` draws. What it is trained to predict, its noise schedule and the scale
of its latents are read from the pretrained configurations; nothing is typed twice.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from vlv import rng as draws
from vlv.config import Timesteps
from vlv.io import images
from vlv.models.conditioners.base import C, Conditioner, Context
from vlv.models.decoders.timesteps import draw_timesteps


class Decoder(nn.Module, ABC, Generic[C]):
    """VAE, text side and noise schedule of a latent diffusion model; a kind adds its denoiser.

    Args:
        image_size: side of the square images it draws, pixels.
    """

    conditioner: Conditioner[C]

    def __init__(
        self,
        vae: AutoencoderKL,
        conditioner: Conditioner[C],
        scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        *,
        image_size: int,
    ) -> None:
        super().__init__()
        self.vae, self.conditioner = vae, conditioner
        self.scheduler, self.image_size = scheduler, image_size
        # A VAE with 3 k^2 input channels takes k x k patches; Stable Diffusion's own has k = 1.
        self._patch = math.isqrt(vae.config.in_channels // 3)
        self._downscale: int = self._patch * 2 ** (len(vae.config.block_out_channels) - 1)
        latent = image_size // self._downscale
        self.latent_shape = (int(vae.config.latent_channels), latent, latent)

    # -- text side -------------------------------------------------------------------------------------

    def condition(self, embeddings: torch.Tensor) -> C:
        """Caption embeddings (B, Q, W) -> context: see the kind's conditioner."""
        return self.conditioner.condition(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> C:
        """Prompts -> context."""
        return self.conditioner.embed_text(prompts)

    def expect_width(self, takes: int) -> None:
        """Refuse a denoiser and a text side that do not belong together.

        Raises:
            ValueError: the denoiser takes a context of another width than the text side gives.
        """
        if takes != self.conditioner.width:
            raise ValueError(
                f"the denoiser takes a context of width {takes}, but the text side gives {self.conditioner.width}"
            )

    @abstractmethod
    def empty_context(self, context: C) -> C:
        """What guidance leads away from: the context without a text, in the shape of `context`."""

    # -- image side ------------------------------------------------------------------------------------

    def encode(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) uint8 -> mean and spread of the scaled latents, each (B, c, h, w)."""
        pixels = F.pixel_unshuffle(images.to_model(batch.to(self.vae.device)), self._patch)
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

    # -- denoising -------------------------------------------------------------------------------------

    @abstractmethod
    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: C) -> torch.Tensor:
        """The denoiser's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or ()."""

    def loss(
        self,
        latents: torch.Tensor,
        context: C,
        generator: torch.Generator,
        timesteps: Timesteps,
        kind: str = "mse",
        same_noise: bool = False,
    ) -> torch.Tensor:
        """Denoising loss of each sample (B,): latents (B, c, h, w) and their context.

        Noise, timestep and target are the pretrained schedule's; the average over channels and pixels is in
        float32.
        """
        t = draw_timesteps(timesteps, len(latents), self.scheduler.config.num_train_timesteps, generator)
        noise = (
            torch.randn(latents.shape[1:], generator=generator, device=generator.device)
            if same_noise
            else draws.normal(latents.shape, generator)
        )
        noise = noise.to(latents).expand_as(latents)
        noisy, target, t = self.add_noise(latents, noise, t.to(latents.device))
        prediction = self.denoise(noisy, t, context).float()
        error = (prediction - target).abs() if kind == "l1" else (prediction - target).square()
        return error.flatten(1).mean(1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, the prediction's target, and the timesteps as the denoiser is told them, for t (B,).

        Here diffusion's: the target is the noise or the velocity (Ho et al. 2020, Salimans and Ho 2022).
        """
        noisy = self.scheduler.add_noise(latents, noise, t)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noisy, noise, t
            case "v_prediction":
                return noisy, self.scheduler.get_velocity(latents, noise, t), t
            case other:
                raise ValueError(f"the scheduler's prediction_type {other!r} is not one this decoder can train")

    @torch.no_grad()
    def sample(self, context: C, seeds: Sequence[int], steps: int, guidance: float) -> torch.Tensor:
        """Draw one image for each context of a batch -> (B, 3, H, W) uint8.

        With classifier-free guidance against the empty context (none at guidance 1). Every image has a seed of
        its own, so that it does not depend on the batch it was drawn in.
        """
        sampler = self.sampler()
        sampler.set_timesteps(steps, device=context.device)
        empty = self.empty_context(context) if guidance != 1.0 else None
        latents = torch.stack(
            [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(context.device)
        for t in sampler.timesteps:
            if empty is None:
                prediction = self.denoise(latents, t, context)
            else:
                both = self.denoise(torch.cat([latents, latents]), t, _together(empty, context))
                without, given = both.float().chunk(2)
                prediction = without + guidance * (given - without)
            latents = sampler.step(prediction.float(), t, latents).prev_sample
        return self.decode(latents)

    def sampler(self) -> Any:
        """A new sampler of the pretrained schedule; here DPM-Solver++."""
        return DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", trust_remote_code=False
        )


def _together(first: C, second: C) -> C:
    if isinstance(first, Context):
        return first.followed_by(second)
    return torch.cat([first, second])


def plain_attention(unet: UNet2DConditionModel) -> None:
    """On a CPU, take plain products: the flash kernel's backward for small heads costs more."""
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())
