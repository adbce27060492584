"""Stable Diffusion XL: two CLIP text encoders, and a UNet that also takes a pooled text vector and image sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from vlv import config
from vlv.config import Section
from vlv.models.build import diffusers_part, noise_schedule, options
from vlv.models.decoders.base import Conditioner, Context, Decoder
from vlv.models.decoders.clip import ClipReader, build_reader


class SDXLConditioner(Conditioner[Context]):
    """Caption embeddings as wide as both encoders' inputs together; each part passes through its own encoder.

    Args:
        first: CLIP ViT-L's text encoder; second: OpenCLIP ViT-bigG's, with its projection.
        use_text_encoder: False: the embeddings replace the states before the last layers.
    """

    def __init__(self, first: ClipReader, second: ClipReader, *, use_text_encoder: bool) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.use_text_encoder = use_text_encoder

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> both encoders' states before their last layers, concatenated (B, Q, W)."""
        if not self.use_text_encoder:
            return embeddings
        first, second = embeddings.split([self.first.width, self.second.width], -1)
        return torch.cat([self.first.states(first), self.second.states(second)], -1)

    def condition(self, embeddings: torch.Tensor) -> Context:
        """Caption embeddings (B, Q, W) -> states (B, Q, W) and the second encoder's pooled vector (B, P).

        The pooled vector is computed from the states, so without `use_text_encoder` it also exists and is of a kind
        that the denoiser knows.
        """
        states = self.states(embeddings)
        return Context(states, self.second.pooled(states[..., self.first.width :]))

    def embed_text(self, prompts: Sequence[str]) -> Context:
        """Prompts -> context of the encoders' full length, as in StableDiffusionXLPipeline."""
        first, _ = self.first.read(prompts)
        second, pooled = self.second.read(prompts)
        return Context(torch.cat([first, second], -1), pooled)


class SDXLDecoder(Decoder[Context]):
    """VAE, UNet, text side and noise schedule of one Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952).

    Raises:
        ValueError: the UNet's context width differs from the text side's, or the UNet takes no sizes.
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
        # Original height and width, top and left of the crop, target height and width. Images in training and in
        # sampling are whole squares of this size, which is also the stock pipeline's default.
        sizes = [image_size, image_size, 0, 0, image_size, image_size]
        self.register_buffer("sizes", torch.tensor([sizes], dtype=torch.float32), persistent=False)
        if not torch.cuda.is_available():
            self.use_fused_attention(False)  # on a CPU its backward pass costs more if heads are small

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.unet

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: Context) -> torch.Tensor:
        """The UNet's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or ()."""
        added = {"text_embeds": context.pooled, "time_ids": self.sizes.expand(len(noisy), -1)}
        prediction: torch.Tensor = self.unet(noisy, timesteps, context.states, added_cond_kwargs=added).sample
        return prediction

    def empty_context(self, context: Context) -> Context:
        """Zeros: SDXL was trained with them instead of dropped texts (force_zeros_for_empty_prompt)."""
        return context.each(torch.zeros_like)

    def sampler(self) -> Any:
        """DPM-Solver++ with diffusers' recommended options for SDXL; without them its last steps are unstable."""
        return DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, use_karras_sigmas=True, euler_at_final=True, trust_remote_code=False
        )


def build_conditioner(section: config.Decoder, folder: Path) -> SDXLConditioner:
    """The text side in a diffusers folder."""
    options(section, Section)
    first = build_reader(CLIPTextModel, folder, "", section.weights)
    second = build_reader(CLIPTextModelWithProjection, folder, "_2", section.weights)
    return SDXLConditioner(first, second, use_text_encoder=section.use_text_encoder)


def build(section: config.Decoder, folder: Path, conditioner: SDXLConditioner) -> SDXLDecoder:
    """The decoder in a diffusers folder."""
    vae = diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    unet = diffusers_part(UNet2DConditionModel, folder, "unet", section.weights)
    schedule = noise_schedule(DDPMScheduler, folder)
    return SDXLDecoder(vae, unet, conditioner, schedule, image_size=section.image_size)
