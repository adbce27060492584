"""Stable Diffusion 1.x and 2.x: a UNet that attends to the context."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from vlv import config
from vlv.models import loading
from vlv.models.conditioners.base import fit
from vlv.models.conditioners.stable_diffusion import TextConditioner
from vlv.models.decoders.base import Decoder, plain_attention


class StableDiffusionDecoder(Decoder[torch.Tensor]):
    """VAE, UNet, text side and noise schedule of one Stable Diffusion; its context is one tensor (B, T, C).

    Raises:
        ValueError: the UNet takes a context of another width than the text side gives.
    """

    conditioner: TextConditioner
    unet: UNet2DConditionModel
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
        super().__init__(vae, conditioner, scheduler, image_size=image_size)
        self.unet = unet
        self.expect_width(unet.config.cross_attention_dim)
        extra = unet.config.in_channels - unet.config.out_channels
        self.register_buffer("coordinates", coordinate_channels(self.latent_shape[-1], extra), persistent=False)
        plain_attention(unet)

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or (), context (B, T, C)."""
        if self.coordinates.shape[1]:
            grid = self.coordinates.expand(len(noisy), -1, -1, -1)
            noisy = torch.cat([noisy, grid.to(noisy.dtype)], 1)
        prediction: torch.Tensor = self.unet(noisy, timesteps, context).sample
        return prediction

    def empty_context(self, context: torch.Tensor) -> torch.Tensor:
        """The empty prompt's context, cut or repeated at its end to the context's length."""
        empty = self.embed_text([""]).to(context.dtype)
        return fit(empty, context.shape[1]).expand_as(context)


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


def build(section: config.Decoder, folder: Path, conditioner: TextConditioner) -> StableDiffusionDecoder:
    """The decoder in a diffusers folder."""
    vae = loading.diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    unet = loading.diffusers_part(UNet2DConditionModel, folder, "unet", section.weights)
    schedule = loading.schedule(DDPMScheduler, folder)
    return StableDiffusionDecoder(vae, unet, conditioner, schedule, image_size=section.image_size)
