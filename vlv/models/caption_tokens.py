"""Captions as token ids and labels, including the end token that the language model must learn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a position without loss, as in torch and transformers


@dataclass(frozen=True)
class CaptionTokens:
    """Token ids of captions, each `[bos] words eos`, without padding; `cut` counts the captions that were cut."""

    ids: list[list[int]]
    cut: int


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int) -> CaptionTokens:
    """Tokenize captions to at most `max_tokens` ids, including <bos> and <eos>.

    A cut caption has no <eos>: the model must not learn to stop in the middle of a sentence.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos token, so the model could never learn to stop")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    result, cut = [], 0
    for words in tokenizer(list(captions), add_special_tokens=False)["input_ids"]:
        ids = [*begin, *words, tokenizer.eos_token_id]
        cut += len(ids) > max_tokens
        result.append(ids[:max_tokens])
    return CaptionTokens(result, cut)


def collate(ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to the longest caption: ids (B, T) and labels (B, T); padding is ignored in the loss.

    A label is at the position of its own token; the loss shifts the labels. If the padding token is also the end
    token (as in many models), the real end is still learned, because labels are set by length, not by value.
    """
    length = max(map(len, ids))
    tokens = torch.full((len(ids), length), pad, dtype=torch.long)
    labels = torch.full((len(ids), length), IGNORED, dtype=torch.long)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, : len(sequence)] = tokens[row, : len(sequence)]
    return tokens, labels
