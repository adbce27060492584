"""The tiny profile's parts that read and write captions: tokenizer, text encoder and language model.

The text encoder is a CLIPTextModel that learns to read scene captions: from its state at the end of each sentence the
background and the cells named so far are read. (Stable Diffusion's own learned from pairs of images and texts; this
stands for that.) Noise on its input embeddings makes it tolerant of embeddings that belong to no word. The language
model is a small Qwen2 that learns caption text alone, with its ends.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import create_causal_mask

from vlv.config import Optimizer, Training
from vlv.models import caption_tokens
from vlv.tiny import scenes
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import loop

LENGTH = 64  # tokens; the longest caption has 56 with its ends
WIDTH = 128
_NOISE = 0.3  # std of the noise on the input embeddings, whose own std is 1

TEXT_ENCODER = Training(
    steps=1600, batch_size=96, precision="bf16", seed=12, checkpoint_every=500, log_every=100,
    optimizer=Optimizer(
        learning_rate=1.5e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=100,
        schedule="hold_then_linear", hold_share=0.3, final_rate_share=0.02, clip_norm=1.0,
    ),
)  # fmt: skip

TEXT_ENCODER_AGAIN = TEXT_ENCODER.model_copy(update={"steps": 2000, "seed": 112})


def tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Word-level, over the grammar's words: <pad> 0, <bos> 1, <eos> 2, <unk> 3, words, then `extra` signs."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *scenes.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    core.add_special_tokens(list(extra))
    # Joins words with spaces and puts full stops and commas back where they belong.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=LENGTH,
    )  # fmt: skip


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    """The architecture with new weights; embeddings start with std 1 so that steps of any size suit them."""
    torch.manual_seed(TEXT_ENCODER.seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH, hidden_act="gelu",
            bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip
    nn.init.normal_(model.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(model.embeddings.position_embedding.weight, std=0.5)
    return model


class _Reading(nn.Module):
    """Cross-entropy of background and cells read from the state at each sentence's end and at <eos>."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        self.background = nn.Linear(WIDTH, len(scenes.COLOURS) + 1)
        self.cells = nn.Linear(WIDTH, len(scenes.PLACES) * (len(scenes.NAMES) + 1))

    def forward(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        ids, where, background, cells = batch
        table = self.model.embeddings.token_embedding(ids)
        noisy = table + _NOISE * torch.randn(table.shape, generator=generator)
        hidden = self.model.embeddings(inputs_embeds=noisy)
        mask = create_causal_mask(
            config=self.model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        hidden = self.model.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
        ends = self.model.final_layer_norm(hidden)[where]  # (ends, WIDTH)
        read = self.cells(ends).float().view(-1, len(scenes.NAMES) + 1)
        return F.cross_entropy(self.background(ends).float(), background) + 4 * F.cross_entropy(read, cells.flatten())


def reading_targets(
    ids: torch.Tensor, pool: list[scenes.Scene], stop: int, colours: set[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where sentences end (B, T) bool, and what is known there: backgrounds (ends,), cells (ends, 9)."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    backgrounds, cells = [], []
    for row, scene in enumerate(pool):
        known, background, said = np.full(9, len(scenes.NAMES)), len(scenes.COLOURS), 0
        begin = 0
        sequence = ids[row].tolist()
        for position, token in enumerate(sequence):
            if token == stop:
                if colours & set(sequence[begin:position]):
                    background = scene.background
                else:
                    place, kind = scene.objects[said]
                    known[place] = kind
                    said += 1
                begin = position
            if token in (stop, 2):
                where[row, position] = True
                backgrounds.append(background)
                cells.append(known.copy())
            if token == 2:
                break
    return where, torch.tensor(backgrounds), torch.from_numpy(np.stack(cells))


def pretrain_text_encoder(pool: Pool, held_out: Pool, folder: Path) -> tuple[CLIPTextModel, dict[str, float]]:
    """Train in `folder` (resumable); figures: held-out cells and whole scenes read right at <eos>."""
    words = tokenizer()
    model = build_text_encoder(len(words))
    objective = _Reading(model)
    stop, background_word = words.convert_tokens_to_ids([".", "background"])
    ids = words(pool.captions, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), TEXT_ENCODER.batch_size, TEXT_ENCODER.seed, step)
            length = int((ids[chosen] != 0).sum(1).max())
            short = ids[chosen, :length]
            yield short, *reading_targets(short, [pool.scenes[i] for i in chosen], stop, {background_word})
            step += 1

    # Two rounds of the schedule: the second warm restart halves the errors that the first leaves.
    loop.train(objective, batches, TEXT_ENCODER, folder, "text-1", title="Text encoder")
    loop.train(objective, batches, TEXT_ENCODER_AGAIN, folder / "again", "text-2", title="Text encoder, again")
    model.eval()
    return model, _share_read_right(objective, words, held_out)


@torch.no_grad()
def _share_read_right(objective: _Reading, words: PreTrainedTokenizerFast, held_out: Pool) -> dict[str, float]:
    objective.eval()
    ids = words(held_out.captions, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    state = objective.model(input_ids=ids).last_hidden_state[torch.arange(len(ids)), (ids == 2).int().argmax(1)]
    cells = objective.cells(state).view(len(ids), 9, -1).argmax(-1).numpy()
    backgrounds = objective.background(state).argmax(-1).numpy()
    right = [scenes.from_targets(b, c) == s for b, c, s in zip(backgrounds, cells, held_out.scenes, strict=True)]
    return {"scenes_read_right": round(float(np.mean(right)), 4)}


# -- language model ------------------------------------------------------------------------------------

LANGUAGE_MODEL = Training(
    steps=520, batch_size=64, precision="bf16", seed=16, checkpoint_every=300, log_every=50,
    optimizer=Optimizer(
        learning_rate=1e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=50,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.05, clip_norm=1.0,
    ),
)  # fmt: skip


def build_language_model(vocabulary: int) -> Qwen2ForCausalLM:
    """The architecture with new weights, 3.0 million parameters."""
    torch.manual_seed(LANGUAGE_MODEL.seed)
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


def pretrain_language_model(pool: Pool, held_out: Pool, folder: Path) -> tuple[Qwen2ForCausalLM, dict[str, float]]:
    """Train in `folder`; figure: perplexity per token of held-out captions."""
    words = tokenizer()
    model = build_language_model(len(words))
    tokens = caption_tokens.tokenize(words, pool.captions, LENGTH).ids

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), LANGUAGE_MODEL.batch_size, LANGUAGE_MODEL.seed, step)
            yield caption_tokens.collate([tokens[i] for i in chosen], 0)
            step += 1

    model.train()
    loop.train(_NextWord(model), batches, LANGUAGE_MODEL, folder, "lm-1", title="Language model")
    model.eval()
    held = caption_tokens.tokenize(words, held_out.captions, LENGTH).ids
    with torch.no_grad():
        ids, labels = caption_tokens.collate(held, 0)
        loss = float(model(input_ids=ids, labels=labels).loss)
    return model, {"perplexity": round(math.exp(loss), 3)}
