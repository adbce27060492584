"""The tiny profile's language model: a small Qwen2 trained on caption text alone, its ends included."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from vlv.config import Optimizer, Training
from vlv.models import caption_tokens
from vlv.tiny import pretrain_text as text
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import loop

SETTINGS = Training(
    steps=520, batch_size=64, precision="bf16", seed=16, checkpoint_every=300, log_every=50,
    optimizer=Optimizer(
        learning_rate=1e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=50,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.05, clip_norm=1.0,
    ),
)  # fmt: skip


def build(vocabulary: int) -> Qwen2ForCausalLM:
    """The architecture with new weights, 3.0 million parameters."""
    torch.manual_seed(SETTINGS.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=192, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, tie_word_embeddings=True, attn_implementation="eager",
        )
    )  # fmt: skip


class _NextWord(nn.Module):
    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        ids, labels = batch
        loss: torch.Tensor = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        return loss


def pretrain(pool: Pool, held_out: Pool, folder: Path) -> tuple[Qwen2ForCausalLM, dict[str, float]]:
    """Train in `folder`; figure: perplexity per token of held-out captions."""
    words = text.tokenizer()
    model = build(len(words))
    tokens = caption_tokens.tokenize(words, pool.captions, text.LENGTH).ids

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), SETTINGS.batch_size, SETTINGS.seed, step)
            yield caption_tokens.collate([tokens[i] for i in chosen], 0)
            step += 1

    model.train()
    loop.train(_NextWord(model), batches, SETTINGS, folder, "lm-1", title="Language model")
    model.eval()
    held = caption_tokens.tokenize(words, held_out.captions, text.LENGTH).ids
    with torch.no_grad():
        ids, labels = caption_tokens.collate(held, 0)
        loss = float(model(input_ids=ids, labels=labels).loss)
    return model, {"perplexity": round(math.exp(loss), 3)}
