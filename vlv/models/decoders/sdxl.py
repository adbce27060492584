"""Stable Diffusion XL: a UNet that also takes a pooled text vector and the sizes of its picture."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from vlv import config
from vlv.models import loading
from vlv.models.conditioners.base import Context
from vlv.models.conditioners.sdxl import SDXLConditioner
from vlv.models.decoders.base import Decoder, plain_attention


class SDXLDecoder(Decoder[Context]):
    """VAE, UNet, text side and noise schedule of one Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952).

    Raises:
        ValueError: the UNet takes a context of another width than the text side gives, or none with sizes.
    """

    sizes: torch.Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        conditioner: SDXLConditioner,
        scheduler: DDPMScheduler,
        *,
        image_size: int,
    ) -> None:
        super().__init__(vae, conditioner, scheduler, image_size=image_size)
        self.unet = unet
        self.expect_width(unet.config.cross_attention_dim)
        if unet.config.addition_embed_type != "text_time":
            raise ValueError("the UNet takes no pooled text vector and sizes (addition_embed_type is not text_time)")
        # Original height and width, top and left of the crop, target height and width. Training pictures are
        # whole squares of this size and so are the drawn ones: what the stock pipeline says by default.
        sizes = [image_size, image_size, 0, 0, image_size, image_size]
        self.register_buffer("sizes", torch.tensor([sizes], dtype=torch.float32), persistent=False)
        plain_attention(unet)

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: Context) -> torch.Tensor:
        """The UNet's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or ()."""
        added = {"text_embeds": context.pooled, "time_ids": self.sizes.expand(len(noisy), -1)}
        prediction: torch.Tensor = self.unet(noisy, timesteps, context.states, added_cond_kwargs=added).sample
        return prediction

    def empty_context(self, context: Context) -> Context:
        """Zeros: SDXL was trained with them in the place of dropped texts (force_zeros_for_empty_prompt)."""
        return context.each(torch.zeros_like)

    def sampler(self) -> Any:
        """DPM-Solver++ as diffusers advises for SDXL, where the plain one is unstable at its last steps."""
        return DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, use_karras_sigmas=True, euler_at_final=True, trust_remote_code=False
        )


def build(section: config.Decoder, folder: Path, conditioner: SDXLConditioner) -> SDXLDecoder:
    """The decoder in a diffusers folder."""
    vae = loading.diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    unet = loading.diffusers_part(UNet2DConditionModel, folder, "unet", section.weights)
    schedule = loading.schedule(DDPMScheduler, folder)
    return SDXLDecoder(vae, unet, conditioner, schedule, image_size=section.image_size)
