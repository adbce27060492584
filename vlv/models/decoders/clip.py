"""CLIP text encoders that take embeddings instead of words.

`CLIPTextModel.forward` takes no `inputs_embeds`, so its submodules are called here in the same order; the results
are bit-identical (tests/test_decoder.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from vlv import config
from vlv.models.build import text_encoder, tokenizer_if_any


def penultimate(model: CLIPTextModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Input embeddings (B, T, W), before positions are added -> states (B, T, W) before the last layer."""
    hidden: torch.Tensor = model.embeddings(inputs_embeds=embeddings)
    mask = _mask(model, hidden)
    for layer in list(model.encoder.layers)[:-1]:
        hidden = layer(hidden, mask, is_causal=True)
    return hidden


def finish(model: CLIPTextModel, states: torch.Tensor) -> torch.Tensor:
    """States (B, T, W) before the last layer -> after it and the final norm."""
    finished: torch.Tensor = model.final_layer_norm(
        model.encoder.layers[-1](states, _mask(model, states), is_causal=True)
    )
    return finished


def _mask(model: CLIPTextModel, hidden: torch.Tensor) -> torch.Tensor | None:
    mask: torch.Tensor | None = create_causal_mask(
        config=model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    return mask


def tokenize(tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Prompts -> ids (B, length), padded as the model's tokenizer pads, or cut.

    Raises:
        ValueError: the encoder was built from an architecture without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError("this text encoder came without a tokenizer, so it cannot read a prompt")
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


class ClipReader(nn.Module):
    """One of two CLIP text encoders and its tokenizer. SDXL and SD 3 read its states before the last layer."""

    def __init__(
        self, model: CLIPTextModel | CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def _text_model(self) -> CLIPTextModel:
        return self.model.text_model if isinstance(self.model, CLIPTextModelWithProjection) else self.model

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Input embeddings (B, Q, W) -> states (B, Q, W) before the last layer."""
        return penultimate(self._text_model, embeddings)

    def pooled(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, Q, W) before the last layer -> (B, P): the projected final state at the last position.

        The last query takes the place of a text's end token, from which this encoder reads its pooled vector: with the
        causal mask only that position sees everything.
        """
        pooled: torch.Tensor = self.model.text_projection(finish(self._text_model, states)[:, -1])
        return pooled

    def read(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts -> states (B, T, W) before the last layer, and the pooled vector (B, P) at their end tokens.

        An encoder without a projection gives its pooled state (B, W) unprojected.
        """
        ids = tokenize(self.tokenizer, prompts, self.model.config.max_position_embeddings)
        output = self.model(input_ids=ids.to(self.model.device), output_hidden_states=True)
        summary = output.text_embeds if isinstance(self.model, CLIPTextModelWithProjection) else output.pooler_output
        return output.hidden_states[-2], summary


def build_reader(cls: Any, folder: Path, number: str, weights: config.Weights) -> ClipReader:
    """Text encoder (of class `cls`) and tokenizer with that number ("" or "_2") in a diffusers folder."""
    model = text_encoder(cls, CLIPTextConfig, folder, f"text_encoder{number}", weights)
    return ClipReader(model, tokenizer_if_any(folder / f"tokenizer{number}"))
