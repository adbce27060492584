"""The text side of Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose final states are the context."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from vlv import config
from vlv.models import loading
from vlv.models.conditioners import clip
from vlv.models.conditioners.base import Conditioner


class TextConditioner(Conditioner[torch.Tensor]):
    """The frozen CLIP text encoder and its tokenizer.

    Args:
        use_text_encoder: whether caption embeddings pass the text encoder on their way to the context.
    """

    def __init__(
        self, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase | None, *, use_text_encoder: bool
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.use_text_encoder = use_text_encoder

    @property
    def width(self) -> int:
        """Width of the caption embeddings and of the context: Stable Diffusion 1.x and 2.x have them equal."""
        return int(self.text_encoder.config.hidden_size)

    def condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> context (B, Q, W).

        Through the frozen text encoder as its input embeddings (positions added, causal mask, final norm;
        arXiv 2507.07104), or unchanged where `use_text_encoder` is off.
        """
        return self._encode(embeddings) if self.use_text_encoder else embeddings

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The context itself, (B, Q, W)."""
        return self.condition(embeddings)

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> context (B, T, W), padded as the tokenizer does for this model."""
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


def build(section: config.Decoder, folder: Path) -> TextConditioner:
    """The text side in a diffusers folder."""
    text_encoder = loading.text_encoder(CLIPTextModel, CLIPTextConfig, folder, "text_encoder", section.weights)
    return TextConditioner(text_encoder, loading.words(folder / "tokenizer"), use_text_encoder=section.use_text_encoder)
