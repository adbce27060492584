"""The frozen text-to-image decoder: the common interface of all kinds.

A decoder is a latent diffusion model of three parts. The conditioner turns caption embeddings or prompts into a
context, the VAE turns images into latents and back, and the denoiser predicts noise from noisy latents and the
context. The prediction type, the noise schedule and the scale of the latents are read from the pretrained
configurations.

A new kind is one module with the two functions of `vlv.models.build.Kind`, and one profile that names it
(docs/decoders.md).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from vlv import rng
from vlv.config import Timesteps
from vlv.io import images


@final
@dataclass(frozen=True)
class Context:
    """The conditioning of SDXL and SD 3 denoisers for B images. Its methods do what a tensor's of the same names do.

    Attributes:
        states: (B, T, C), the concatenated states of both CLIP encoders.
        pooled: (B, P), the pooled vector of the whole text.
        t5: (B, U, D), the states of the T5 encoder, if it is used.
    """

    states: torch.Tensor
    pooled: torch.Tensor
    t5: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.states.device

    def float(self) -> "Context":
        return self.each(lambda x: x.float())

    def repeat_interleave(self, repeats: int, dim: int) -> "Context":
        return self.each(lambda x: x.repeat_interleave(repeats, dim))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Context":
        """Apply the same change to all its tensors."""
        return Context(change(self.states), change(self.pooled), None if self.t5 is None else change(self.t5))

    def followed_by(self, other: "Context") -> "Context":
        """Concatenate both batches; the tensors of `other` have the same lengths and widths."""
        t5 = None if self.t5 is None or other.t5 is None else torch.cat([self.t5, other.t5])
        return Context(torch.cat([self.states, other.states]), torch.cat([self.pooled, other.pooled]), t5)


C = TypeVar("C", torch.Tensor, Context)


class Conditioner(nn.Module, ABC, Generic[C]):
    """The text side of a decoder; C is the type of its denoiser's context.

    It is a separate module because the captioner needs it without the VAE and the denoiser.

    Attributes:
        use_text_encoder: whether caption embeddings pass through the text encoders.
    """

    use_text_encoder: bool

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the caption embeddings and of their states (W)."""

    @abstractmethod
    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> states (B, Q, W), one for each query; Stage 2 reads them."""

    @abstractmethod
    def condition(self, embeddings: torch.Tensor) -> C:
        """Caption embeddings (B, Q, W) -> the denoiser's context."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> C:
        """Prompts -> the denoiser's context, as in the stock pipeline.

        Raises:
            ValueError: built from an architecture without tokenizers.
        """


class Decoder(nn.Module, ABC, Generic[C]):
    """VAE, conditioner and noise schedule of a latent diffusion model; a kind adds its denoiser.

    Gradient checkpointing and FSDP work on whole blocks. The models of transformers and diffusers list the classes of
    their blocks in `_no_split_modules`; a kind with its own denoiser lists its classes in an attribute of the same
    name (a list of strings).

    Args:
        image_size: side of the square images that it draws, in pixels.
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
        # A VAE with 3 k^2 input channels takes k x k patches; Stable Diffusion's VAE has k = 1.
        self._patch = math.isqrt(vae.config.in_channels // 3)
        self._downscale: int = self._patch * 2 ** (len(vae.config.block_out_channels) - 1)
        latent = image_size // self._downscale
        self.latent_shape = (int(vae.config.latent_channels), latent, latent)

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that `denoise` calls."""

    def use_fused_attention(self, fused: bool) -> None:
        """Compute the attention of a UNet in one fused kernel, or as plain matrix products.

        Other denoisers of diffusers always use the fused kernel.
        """
        if isinstance(self.denoiser, UNet2DConditionModel):
            self.denoiser.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())

    # -- text side -------------------------------------------------------------------------------------

    def condition(self, embeddings: torch.Tensor) -> C:
        """Caption embeddings (B, Q, W) -> context, by the conditioner."""
        return self.conditioner.condition(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> C:
        """Prompts -> context."""
        return self.conditioner.embed_text(prompts)

    def expect_width(self, takes: int) -> None:
        """Refuse a denoiser and a text side that do not fit together.

        Raises:
            ValueError: the denoiser's context width differs from the text side's.
        """
        if takes != self.conditioner.width:
            raise ValueError(
                f"the denoiser takes a context of width {takes}, but the text side gives {self.conditioner.width}"
            )

    @abstractmethod
    def empty_context(self, context: C) -> C:
        """The context of an empty text, in the shape of `context`, for classifier-free guidance."""

    # -- image side ------------------------------------------------------------------------------------

    def encode(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) uint8 -> mean and std of the scaled latents, each (B, c, h, w)."""
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
        """Denoising loss of each sample, (B,), for latents (B, c, h, w) and their context.

        Noise, timesteps and target follow the pretrained schedule. The mean over channels and pixels is computed in
        float32.

        Args:
            kind: "mse" or "l1".
            same_noise: use one noise tensor for the whole batch.
        """
        t = draw_timesteps(timesteps, len(latents), self.scheduler.config.num_train_timesteps, generator)
        noise = (
            torch.randn(latents.shape[1:], generator=generator, device=generator.device)
            if same_noise
            else rng.normal(latents.shape, generator)
        )
        noise = noise.to(latents).expand_as(latents)
        noisy, target, t = self.add_noise(latents, noise, t.to(latents.device))
        prediction = self.denoise(noisy, t, context).float()
        error = (prediction - target).abs() if kind == "l1" else (prediction - target).square()
        return error.flatten(1).mean(1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, the target of the prediction, and the denoiser's timesteps, for t (B,).

        The default is diffusion: the target is the noise (Ho et al. 2020, arXiv 2006.11239) or the velocity (Salimans
        and Ho 2022, arXiv 2202.00512).
        """
        noisy = self.scheduler.add_noise(latents, noise, t)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noisy, noise, t
            case "v_prediction":
                return noisy, self.scheduler.get_velocity(latents, noise, t), t
            case other:
                raise ValueError(f"prediction_type {other!r} of the scheduler is neither epsilon nor v_prediction")

    @torch.no_grad()
    def sample(self, context: C, seeds: Sequence[int], steps: int, guidance: float) -> torch.Tensor:
        """Draw one image for each context of a batch -> (B, 3, H, W) uint8.

        Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) contrasts the context with the empty context;
        guidance 1 turns it off. Each image has its own seed, so it does not depend on the rest of its batch.
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
        """A new sampler with the pretrained schedule, DPM-Solver++ by default. `scale_model_input` is never called."""
        return DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", trust_remote_code=False
        )


def _together(first: C, second: C) -> C:
    if isinstance(first, Context):
        return first.followed_by(second)
    return torch.cat([first, second])


def fit(states: torch.Tensor, length: int) -> torch.Tensor:
    """Cut states (B, T, C) to `length`, or repeat the last state up to it."""
    if states.shape[1] < length:
        states = torch.cat([states, states[:, -1:].expand(-1, length - states.shape[1], -1)], 1)
    return states[:, :length]


def draw_timesteps(settings: Timesteps, count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,) int64 in [0, total) on the generator's device; the higher, the noisier.

    uniform: independent; stratified: one from each of as many equal slices of [0, total) as the batch has samples
    (over all processes and micro-batches), in random order; logit_normal: `total` times the sigmoid of a standard
    normal (Esser et al. 2024, arXiv 2403.03206); fixed: always the same. A share `high_noise_share` of them is drawn
    again from [high_noise_from, total).
    """
    return rng.rows(count, generator, lambda n: _timesteps(settings, n, total, generator))


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
