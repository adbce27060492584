"""Stable Diffusion 3 and 3.5: two CLIP text encoders, optionally T5, and a flow-matching transformer (MMDiT)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from pydantic import Field
from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from vlv import config
from vlv.config import Section
from vlv.models.build import diffusers_part, noise_schedule, options, text_encoder, tokenizer_if_any
from vlv.models.decoders.base import Conditioner, Context, Decoder, fit
from vlv.models.decoders.clip import ClipReader, build_reader, tokenize

T5_TOKENS = 256  # length of T5's part, also where it is absent: StableDiffusion3Pipeline's max_sequence_length


class Options(Section):
    """The settings that only this kind has: `decoder.options` of the configuration."""

    use_t5: bool = Field(default=False, description="whether the T5 encoder takes part; the model can do without it")


class T5Reader(nn.Module):
    """The T5 encoder and its tokenizer. Its positions are relative and its attention is bidirectional."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Input embeddings (B, Q, D) -> final states (B, Q, D)."""
        states: torch.Tensor = self.model(inputs_embeds=embeddings).last_hidden_state
        return states

    def read(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> final states (B, T5_TOKENS, D); padding is read like text, as the stock pipeline does."""
        ids = tokenize(self.tokenizer, prompts, T5_TOKENS)
        states: torch.Tensor = self.model(input_ids=ids.to(self.model.device)).last_hidden_state
        return states


class SD3Conditioner(Conditioner[Context]):
    """Caption embeddings as wide as all encoders' inputs together; each part passes through its own encoder.

    Args:
        first: CLIP ViT-L's text encoder; second: OpenCLIP ViT-bigG's; both with their projections.
        t5: None: T5 is not used, and the decoder uses zeros instead.
        use_text_encoder: False: the embeddings replace the CLIP states before the last layers and T5's final states.
    """

    def __init__(self, first: ClipReader, second: ClipReader, t5: T5Reader | None, *, use_text_encoder: bool) -> None:
        super().__init__()
        self.first, self.second, self.t5 = first, second, t5
        self.use_text_encoder = use_text_encoder

    @property
    def t5_width(self) -> int:
        """Width of T5's part; 0 if T5 is not used."""
        return 0 if self.t5 is None else self.t5.width

    @property
    def _widths(self) -> list[int]:
        return [self.first.width, self.second.width, self.t5_width]

    @property
    def width(self) -> int:
        return sum(self._widths)

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> the concatenated states of all encoders (B, Q, W)."""
        if not self.use_text_encoder:
            return embeddings
        first, second, third = embeddings.split(self._widths, -1)
        clips = [self.first.states(first), self.second.states(second)]
        return torch.cat(clips if self.t5 is None else [*clips, self.t5.states(third)], -1)

    def condition(self, embeddings: torch.Tensor) -> Context:
        """Caption embeddings (B, Q, W) -> CLIP states, both pooled CLIP vectors concatenated (B, P), and T5's states.

        The pooled vectors are computed from the states, so they also exist without `use_text_encoder`.
        """
        first, second, third = self.states(embeddings).split(self._widths, -1)
        pooled = torch.cat([self.first.pooled(first), self.second.pooled(second)], -1)
        return Context(torch.cat([first, second], -1), pooled, None if self.t5 is None else third)

    def embed_text(self, prompts: Sequence[str]) -> Context:
        """Prompts -> context of the encoders' full lengths, as in StableDiffusion3Pipeline."""
        (first, first_pooled), (second, second_pooled) = self.first.read(prompts), self.second.read(prompts)
        pooled = torch.cat([first_pooled, second_pooled], -1)
        return Context(torch.cat([first, second], -1), pooled, None if self.t5 is None else self.t5.read(prompts))


class SD3Decoder(Decoder[Context]):
    """VAE, transformer, text side and noise schedule of one Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206).

    Raises:
        ValueError: the transformer does not fit the text side, the image size or the schedule.
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
            raise ValueError("this decoder does not support a scheduler with use_dynamic_shifting")

    @property
    def denoiser(self) -> SD3Transformer2DModel:
        """The transformer."""
        return self.transformer

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
        """CLIP states padded with zeros to T5's width, followed by T5's states, or by zeros without T5."""
        width = self.transformer.config.joint_attention_dim
        clips = F.pad(context.states, (0, width - context.states.shape[-1]))
        t5 = context.t5
        if t5 is None:
            t5 = clips.new_zeros(len(clips), T5_TOKENS, width)
        return torch.cat([clips, t5], 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Points on the straight line from latents to noise, the line's direction, and the timesteps, for t (B,).

        t is an index into the schedule before its shift. diffusers lists the noisiest entry first.
        """
        entry = self.scheduler.config.num_train_timesteps - 1 - t
        sigma = self.scheduler.sigmas.to(latents)[entry].view(-1, 1, 1, 1)
        timesteps = self.scheduler.timesteps.to(latents)[entry]
        return sigma * noise + (1.0 - sigma) * latents, noise - latents, timesteps

    def empty_context(self, context: Context) -> Context:
        """The empty prompt's context; each part is cut, or its last state repeated, to the length in `context`."""
        empty = self.embed_text([""])
        t5 = None
        if empty.t5 is not None and context.t5 is not None:
            t5 = fit(empty.t5, context.t5.shape[1]).to(context.t5.dtype).expand_as(context.t5)
        states = fit(empty.states, context.states.shape[1]).to(context.states.dtype)
        pooled = empty.pooled.to(context.pooled.dtype).expand_as(context.pooled)
        return Context(states.expand_as(context.states), pooled, t5)

    def sampler(self) -> Any:
        """Euler's method for the flow, with the pretrained schedule's shift."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, trust_remote_code=False)


def build_conditioner(section: config.Decoder, folder: Path) -> SD3Conditioner:
    """The text side in a diffusers folder."""
    first = build_reader(CLIPTextModelWithProjection, folder, "", section.weights)
    second = build_reader(CLIPTextModelWithProjection, folder, "_2", section.weights)
    t5 = None
    if options(section, Options).use_t5:
        model = text_encoder(T5EncoderModel, T5Config, folder, "text_encoder_3", section.weights)
        t5 = T5Reader(model, tokenizer_if_any(folder / "tokenizer_3"))
    return SD3Conditioner(first, second, t5, use_text_encoder=section.use_text_encoder)


def build(section: config.Decoder, folder: Path, conditioner: SD3Conditioner) -> SD3Decoder:
    """The decoder in a diffusers folder."""
    vae = diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    transformer = diffusers_part(SD3Transformer2DModel, folder, "transformer", section.weights)
    schedule = noise_schedule(FlowMatchEulerDiscreteScheduler, folder)
    return SD3Decoder(vae, transformer, conditioner, schedule, image_size=section.image_size)
