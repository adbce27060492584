"""Sentence similarity: how close written captions are to the true ones where no counted truth is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

Cosines = NDArray[np.float64]


class SentenceModelError(ValueError):
    """A sentence model that cannot be built; the message names the folder and what is wrong."""


class SentenceModel:
    """A sentence-transformers model with mean pooling (Reimers and Gurevych 2019), such as all-MiniLM-L6-v2."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # for a damaged folder the library raises errors of any kind
            first = str(error).strip().split("\n")[0] or type(error).__name__
            raise SentenceModelError(
                f"evaluate.sentence_model could not be built from {folder}: {first} (Code in a folder is never run.)"
            ) from error
        self._model = model.eval().to(device or "cpu")

    @torch.no_grad()
    def embed(self, sentences: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Unit vectors (N, D), float32; tokens beyond the model's length are cut."""
        parts = []
        for i in range(0, len(sentences), batch_size):
            chosen = list(sentences[i : i + batch_size])
            inputs = self._tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
            inputs = inputs.to(self._model.device)
            states = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(states.dtype)
            parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(parts)


def cosines(model: SentenceModel, written: Sequence[str], true: Sequence[str]) -> tuple[Cosines, Cosines]:
    """Cosines in [-1, 1] of each of N captions, (N,): with its own true caption, and with another image's."""
    ours, theirs = model.embed(written), model.embed(true)
    own, another = ((x * theirs).sum(-1).double().numpy() for x in (ours, ours.roll(-1, 0)))
    return own, another
