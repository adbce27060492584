"""The text side of Stable Diffusion XL: two CLIP text encoders side by side, the second one's summary as pooled."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from vlv import config
from vlv.models.conditioners.base import Conditioner, Context
from vlv.models.conditioners.clip import ClipReader, build_reader


class SDXLConditioner(Conditioner[Context]):
    """Caption embeddings as wide as both encoders' inputs together; each part passes its own encoder.

    Args:
        first: CLIP ViT-L's text encoder; second: OpenCLIP ViT-bigG's, with its projection.
        use_text_encoder: off: the embeddings stand for the states before the last layers.
    """

    def __init__(self, first: ClipReader, second: ClipReader, *, use_text_encoder: bool) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.use_text_encoder = use_text_encoder

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> both encoders' states before their last layers, side by side (B, Q, W)."""
        if not self.use_text_encoder:
            return embeddings
        first, second = embeddings.split([self.first.width, self.second.width], -1)
        return torch.cat([self.first.states(first), self.second.states(second)], -1)

    def condition(self, embeddings: torch.Tensor) -> Context:
        """Caption embeddings (B, Q, W) -> states (B, Q, W) and the second encoder's summary (B, P) of its part.

        The summary is taken from the states, so that it exists (and is one the denoiser knows) with
        `use_text_encoder` off as well.
        """
        states = self.states(embeddings)
        return Context(states, self.second.pooled(states[..., self.first.width :]))

    def embed_text(self, prompts: Sequence[str]) -> Context:
        """Prompts -> context of the encoders' full length, as StableDiffusionXLPipeline has it."""
        first, _ = self.first.read(prompts)
        second, pooled = self.second.read(prompts)
        return Context(torch.cat([first, second], -1), pooled)


def build(section: config.Decoder, folder: Path) -> SDXLConditioner:
    """The text side in a diffusers folder."""
    first = build_reader(CLIPTextModel, folder, "", section.weights)
    second = build_reader(CLIPTextModelWithProjection, folder, "_2", section.weights)
    return SDXLConditioner(first, second, use_text_encoder=section.use_text_encoder)
