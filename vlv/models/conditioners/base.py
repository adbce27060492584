"""What all text sides share: the interface, and the context of denoisers that want more than one tensor."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch
from torch import nn


@final
@dataclass(frozen=True)
class Context:
    """What SDXL and SD 3 denoisers are conditioned on, for B images. The methods are a tensor's of the same names.

    Attributes:
        states: (B, T, C) states of both CLIP encoders, side by side.
        pooled: (B, P), the summary of the whole text.
        t5: (B, U, D) states of the T5 encoder, where it takes part.
    """

    states: torch.Tensor
    pooled: torch.Tensor
    t5: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.states.device

    def float(self) -> "Context":
        return self.each(lambda x: x.float())

    def repeat_interleave(self, repeats: int, dim: int) -> "Context":
        return self.each(lambda x: x.repeat_interleave(repeats, dim))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Context":
        """The same change to all its tensors."""
        return Context(change(self.states), change(self.pooled), None if self.t5 is None else change(self.t5))

    def followed_by(self, other: "Context") -> "Context":
        """Both batches in one; other's tensors have the same lengths and widths."""
        t5 = None if self.t5 is None or other.t5 is None else torch.cat([self.t5, other.t5])
        return Context(torch.cat([self.states, other.states]), torch.cat([self.pooled, other.pooled]), t5)


C = TypeVar("C", torch.Tensor, Context)


class Conditioner(nn.Module, ABC, Generic[C]):
    """One text side; C is what its denoiser takes as context.

    Attributes:
        use_text_encoder: whether caption embeddings pass the text encoders on their way to the context.
    """

    use_text_encoder: bool

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the caption embeddings and of their states."""

    @abstractmethod
    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Caption embeddings (B, Q, W) -> their states (B, Q, W), one for each query: what Stage 2 reads."""

    @abstractmethod
    def condition(self, embeddings: torch.Tensor) -> C:
        """Caption embeddings (B, Q, W) -> the denoiser's context."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> C:
        """Prompts -> the denoiser's context, as the stock pipeline makes it.

        Raises:
            ValueError: built from an architecture without tokenizers.
        """


def fit(states: torch.Tensor, length: int) -> torch.Tensor:
    """Cut states (B, T, C) to `length`, or repeat their last one up to it."""
    if states.shape[1] < length:
        states = torch.cat([states, states[:, -1:].expand(-1, length - states.shape[1], -1)], 1)
    return states[:, :length]
