"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, and a UNet that attends to its final states."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from vlv import config
from vlv.config import Section
from vlv.models.build import diffusers_part, noise_schedule, options, text_encoder, tokenizer_if_any
from vlv.models.decoders import clip
from vlv.models.decoders.base import Conditioner, Decoder, fit


class TextConditioner(Conditioner[torch.Tensor]):
    """The frozen CLIP text encoder and its tokenizer.

    Args:
        use_text_encoder: whether caption embeddings pass through the text encoder.
    """

    def __init__(
        self, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase | None, *, use_text_encoder: bool
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.use_text_encoder = use_text_encoder

    @property
    def width(self) -> int:
        """Width of the caption embeddings and of the context; they are equal in Stable Diffusion 1.x and 2.x."""
        return int(self.text_encoder.config.hidden_size)

    def condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> context (B, Q, W).

        They pass through the frozen text encoder as its input embeddings (positions added, causal mask, final norm;
        arXiv 2507.07104), or stay unchanged without `use_text_encoder`.
        """
        return self._encode(embeddings) if self.use_text_encoder else embeddings

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The context itself, (B, Q, W)."""
        return self.condition(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> context (B, T, W), padded as this model's tokenizer pads."""
        return self._encode(self.text_encoder.embeddings.token_embedding(self.tokenize(prompts)))

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> ids (B, T), padded to the text encoder's full length.

        Raises:
            ValueError: built from an architecture without a tokenizer.
        """
        ids = clip.tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)
        return ids.to(self.text_encoder.device)

    def _encode(self, embeddings: torch.Tensor) -> torch.Tensor:
        return clip.finish(self.text_encoder, clip.penultimate(self.text_encoder, embeddings))


class StableDiffusionDecoder(Decoder[torch.Tensor]):
    """VAE, UNet, text side and noise schedule of one Stable Diffusion; its context is one tensor (B, T, C).

    Raises:
        ValueError: the UNet's context width differs from the text side's.
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
        if not torch.cuda.is_available():
            self.use_fused_attention(False)  # on a CPU its backward pass costs more if heads are small

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.unet

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, c, h, w) for noisy latents at `timesteps` (B,) or (), context (B, T, C)."""
        if self.coordinates.shape[1]:
            grid = self.coordinates.expand(len(noisy), -1, -1, -1)
            noisy = torch.cat([noisy, grid.to(noisy.dtype)], 1)
        prediction: torch.Tensor = self.unet(noisy, timesteps, context).sample
        return prediction

    def empty_context(self, context: torch.Tensor) -> torch.Tensor:
        """The empty prompt's context, cut, or its last state repeated, to the length of `context`."""
        empty = self.embed_text([""]).to(context.dtype)
        return fit(empty, context.shape[1]).expand_as(context)


def coordinate_channels(size: int, count: int) -> torch.Tensor:
    """Constant input channels (1, count, size, size) that encode the position in the image for a UNet.

    A UNet with more input than output channels gets them, as inpainting models get their mask: sine and cosine of
    x and y at `count / 4` octaves. With them, small UNets learn the places of objects much sooner. Stable Diffusion
    has none (count 0).
    """
    if count % 4:
        raise ValueError(f"this decoder does not support a UNet with {count} extra input channels")
    axis = (torch.arange(size) + 0.5) / size
    waves = [f(math.pi * 2**k * axis) for k in range(count // 4) for f in (torch.sin, torch.cos)]
    if not waves:
        return torch.empty(1, 0, size, size)
    stacked = torch.stack(waves)
    across = stacked[:, None, :].expand(-1, size, -1)
    down = stacked[:, :, None].expand(-1, -1, size)
    return torch.cat([across, down])[None].contiguous()


def build_conditioner(section: config.Decoder, folder: Path) -> TextConditioner:
    """The text side in a diffusers folder."""
    options(section, Section)
    model = text_encoder(CLIPTextModel, CLIPTextConfig, folder, "text_encoder", section.weights)
    return TextConditioner(model, tokenizer_if_any(folder / "tokenizer"), use_text_encoder=section.use_text_encoder)


def build(section: config.Decoder, folder: Path, conditioner: TextConditioner) -> StableDiffusionDecoder:
    """The decoder in a diffusers folder."""
    vae = diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    unet = diffusers_part(UNet2DConditionModel, folder, "unet", section.weights)
    schedule = noise_schedule(DDPMScheduler, folder)
    return StableDiffusionDecoder(vae, unet, conditioner, schedule, image_size=section.image_size)
