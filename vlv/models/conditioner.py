"""The text side of a Stable Diffusion: prompts or caption embeddings -> cross-attention context.

It stands apart from the UNet and the VAE because the captioner needs it without them.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask


class TextConditioner(nn.Module):
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
        return self._encode(inputs_embeds=embeddings) if self.use_text_encoder else embeddings

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> context (B, T, W), padded as the tokenizer does for this model."""
        return self._encode(input_ids=self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> ids (B, T), padded to the text encoder's full length.

        Raises:
            ValueError: built from an architecture without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this text encoder came without a tokenizer, so it can read no prompt")
        length = self.text_encoder.config.max_position_embeddings
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids.to(self.text_encoder.device)

    def _encode(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        # CLIPTextModel.forward takes no inputs_embeds, so its own parts are called in its own order.
        model = self.text_encoder
        hidden = model.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        mask = create_causal_mask(config=model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        encoded = model.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True)
        context: torch.Tensor = model.final_layer_norm(encoded.last_hidden_state)
        return context
