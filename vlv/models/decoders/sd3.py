"""Stable Diffusion 3 and 3.5: a multimodal diffusion transformer (MMDiT) that learned rectified flow."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from vlv import config
from vlv.models import loading
from vlv.models.conditioners.base import Context, fit
from vlv.models.conditioners.sd3 import T5_TOKENS, SD3Conditioner
from vlv.models.decoders.base import Decoder


class SD3Decoder(Decoder[Context]):
    """VAE, transformer, text side and noise schedule of one Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206).

    Raises:
        ValueError: the transformer does not take what the text side gives, images of this size, or this schedule.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: SD3Transformer2DModel,
        conditioner: SD3Conditioner,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        image_size: int,
    ) -> None:
        super().__init__(vae, conditioner, scheduler, image_size=image_size)
        self.transformer = transformer
        self._check(conditioner)

    def _check(self, conditioner: SD3Conditioner) -> None:
        config = self.transformer.config
        clips = conditioner.first.width + conditioner.second.width
        if clips > config.joint_attention_dim or conditioner.t5_width not in (0, config.joint_attention_dim):
            raise ValueError(
                f"the transformer takes a context of width {config.joint_attention_dim}, but the CLIP encoders "
                f"together have {clips} and T5 has {conditioner.t5_width}"
            )
        multiple = self._downscale * config.patch_size
        if self.image_size % multiple or self.image_size > multiple * config.pos_embed_max_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {multiple} and at most "
                f"{multiple * config.pos_embed_max_size}"
            )
        if self.scheduler.config.use_dynamic_shifting:
            raise ValueError("a scheduler with use_dynamic_shifting is not one this decoder knows")

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: Context) -> torch.Tensor:
        """The transformer's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or ()."""
        prediction: torch.Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=self._joint(context),
            pooled_projections=context.pooled,
            timestep=timesteps.expand(len(noisy)),
        ).sample
        return prediction

    def _joint(self, context: Context) -> torch.Tensor:
        """CLIP states filled up with zeros to T5's width, followed by T5's states, or zeros where it is absent."""
        width = self.transformer.config.joint_attention_dim
        clips = F.pad(context.states, (0, width - context.states.shape[-1]))
        t5 = context.t5
        if t5 is None:
            t5 = clips.new_zeros(len(clips), T5_TOKENS, width)
        return torch.cat([clips, t5], 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Points on the straight way from latents to noise, its direction, and the timesteps of t (B,).

        t counts the schedule's entries before its shift; diffusers lists them from the noisiest on.
        """
        entry = self.scheduler.config.num_train_timesteps - 1 - t
        sigma = self.scheduler.sigmas.to(latents)[entry].view(-1, 1, 1, 1)
        told = self.scheduler.timesteps.to(latents)[entry]
        return sigma * noise + (1.0 - sigma) * latents, noise - latents, told

    def empty_context(self, context: Context) -> Context:
        """The empty prompt's context, each part cut or repeated at its end to the context's length."""
        empty = self.embed_text([""])
        t5 = None
        if empty.t5 is not None and context.t5 is not None:
            t5 = fit(empty.t5, context.t5.shape[1]).to(context.t5.dtype).expand_as(context.t5)
        states = fit(empty.states, context.states.shape[1]).to(context.states.dtype)
        pooled = empty.pooled.to(context.pooled.dtype).expand_as(context.pooled)
        return Context(states.expand_as(context.states), pooled, t5)

    def sampler(self) -> Any:
        """Euler's method on the flow, with the pretrained schedule's shift."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, trust_remote_code=False)


def build(section: config.Decoder, folder: Path, conditioner: SD3Conditioner) -> SD3Decoder:
    """The decoder in a diffusers folder."""
    vae = loading.diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    transformer = loading.diffusers_part(SD3Transformer2DModel, folder, "transformer", section.weights)
    schedule = loading.schedule(FlowMatchEulerDiscreteScheduler, folder)
    return SD3Decoder(vae, transformer, conditioner, schedule, image_size=section.image_size)
