"""The text side of Stable Diffusion 3 and 3.5: two CLIP text encoders, and T5 where it is wanted."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from vlv import config
from vlv.models import loading
from vlv.models.conditioners.base import Conditioner, Context
from vlv.models.conditioners.clip import ClipReader, build_reader, tokenize

T5_TOKENS = 256  # length of T5's part, also where it is absent: StableDiffusion3Pipeline's max_sequence_length


class T5Reader(nn.Module):
    """The T5 encoder and its tokenizer. It has relative positions and sees in both directions."""

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
    """Caption embeddings as wide as the encoders' inputs together; each part passes its own encoder.

    Args:
        first: CLIP ViT-L's text encoder; second: OpenCLIP ViT-bigG's; both with their projections.
        t5: None: T5 takes no part, and the decoder puts zeros in its place.
        use_text_encoder: off: the embeddings stand for the CLIP states before the last layers and T5's final ones.
    """

    def __init__(self, first: ClipReader, second: ClipReader, t5: T5Reader | None, *, use_text_encoder: bool) -> None:
        super().__init__()
        self.first, self.second, self.t5 = first, second, t5
        self.use_text_encoder = use_text_encoder

    @property
    def t5_width(self) -> int:
        """Width of T5's part; 0 where it takes none."""
        return 0 if self.t5 is None else self.t5.width

    @property
    def _widths(self) -> list[int]:
        return [self.first.width, self.second.width, self.t5_width]

    @property
    def width(self) -> int:
        return sum(self._widths)

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> all encoders' states side by side (B, Q, W)."""
        if not self.use_text_encoder:
            return embeddings
        first, second, third = embeddings.split(self._widths, -1)
        clips = [self.first.states(first), self.second.states(second)]
        return torch.cat(clips if self.t5 is None else [*clips, self.t5.states(third)], -1)

    def condition(self, embeddings: torch.Tensor) -> Context:
        """Caption embeddings (B, Q, W) -> CLIP states, both CLIP summaries side by side (B, P), and T5's states.

        The summaries are taken from the states, so that they exist with `use_text_encoder` off as well.
        """
        first, second, third = self.states(embeddings).split(self._widths, -1)
        pooled = torch.cat([self.first.pooled(first), self.second.pooled(second)], -1)
        return Context(torch.cat([first, second], -1), pooled, None if self.t5 is None else third)

    def embed_text(self, prompts: Sequence[str]) -> Context:
        """Prompts -> context of the encoders' full lengths, as StableDiffusion3Pipeline has it."""
        (first, first_pooled), (second, second_pooled) = self.first.read(prompts), self.second.read(prompts)
        pooled = torch.cat([first_pooled, second_pooled], -1)
        return Context(torch.cat([first, second], -1), pooled, None if self.t5 is None else self.t5.read(prompts))


def build(section: config.Decoder, folder: Path) -> SD3Conditioner:
    """The text side in a diffusers folder."""
    first = build_reader(CLIPTextModelWithProjection, folder, "", section.weights)
    second = build_reader(CLIPTextModelWithProjection, folder, "_2", section.weights)
    t5 = None
    if section.use_t5:
        model = loading.text_encoder(T5EncoderModel, T5Config, folder, "text_encoder_3", section.weights)
        t5 = T5Reader(model, loading.words(folder / "tokenizer_3"))
    return SD3Conditioner(first, second, t5, use_text_encoder=section.use_text_encoder)
