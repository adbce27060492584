"""A kind of decoder from outside the package: `decoder.kind: tests.toy_decoder`.

It draws with the shipped VAE and noise schedule, a table of words for a text side, and two convolutions for a denoiser.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from pydantic import Field
from torch import nn

from vlv import config
from vlv.config import Section
from vlv.models.build import building, diffusers_part, noise_schedule, options
from vlv.models.decoders.base import Conditioner, Decoder

_WORDS = 100


class Options(Section):
    """`decoder.options` of this kind."""

    width: int = Field(default=12, gt=0, description="of the caption embeddings")


class ToyConditioner(Conditioner[torch.Tensor]):
    """The states of the embeddings are their running means, as a causal text encoder's depend on what came before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        self.use_text_encoder = True

    @property
    def width(self) -> int:
        return self.words.embedding_dim

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        counts = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
        return embeddings.cumsum(1) / counts[:, None]

    def condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.states(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        ids = [[zlib.crc32(word.encode()) % _WORDS for word in (prompt.split() + [""] * 4)[:4]] for prompt in prompts]
        return self.states(self.words(torch.tensor(ids)))


class ToyDenoiser(nn.Module):
    """Noisy latents and the mean of the context -> predicted noise."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noisy: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.leave(torch.tanh(self.enter(noisy) + context.mean(1)[:, :, None, None]))
        return predicted


class ToyDecoder(Decoder[torch.Tensor]):
    """What `base.Decoder` asks of a kind, and no more."""

    _no_split_modules = ("ToyDenoiser",)  # gradient checkpointing and FSDP treat it as one block

    def __init__(
        self, vae: AutoencoderKL, conditioner: ToyConditioner, scheduler: DDPMScheduler, *, image_size: int
    ) -> None:
        super().__init__(vae, conditioner, scheduler, image_size=image_size)
        self.network = ToyDenoiser(self.latent_shape[0], conditioner.width)

    @property
    def denoiser(self) -> ToyDenoiser:
        return self.network

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.network(noisy, context)
        return predicted

    def empty_context(self, context: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(context)


def build_conditioner(section: config.Decoder, folder: Path) -> ToyConditioner:
    """The text side, always with the same random words."""
    with building("toy words", folder, "random"):
        return ToyConditioner(options(section, Options).width)


def build(section: config.Decoder, folder: Path, conditioner: ToyConditioner) -> ToyDecoder:
    """The decoder around the VAE and the noise schedule in `folder`."""
    vae = diffusers_part(AutoencoderKL, folder, "vae", section.weights)
    schedule = noise_schedule(DDPMScheduler, folder)
    with building("toy denoiser", folder, "random"):
        return ToyDecoder(vae, conditioner, schedule, image_size=section.image_size)
