"""Dropout and drop-path whose masks are a function of (seed, step, sample).

torch's own dropout takes its masks from the process's global generator: a resumed training, or one that other
processes share, would draw others. Here each sample has masks of its own, seeded by the step and the sample's place
in the whole batch, so that it does not matter who computes it, with which neighbours, or how often.

Models stay in evaluation mode, in which torch's dropout does nothing: nothing is dropped but where a training's
forward pass hands on `Masks`. Masks are drawn on the device: a CPU and a GPU draw different ones.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vlv import rng as draws


class Masks:
    """The masks of one forward pass, in the order in which they are asked for.

    Args:
        generator: the step's; nothing is drawn from it, its seed and its part of the batch are read.
        samples: how many samples this part has.
        drawn: how many masks were drawn before.
    """

    def __init__(self, generator: torch.Generator, samples: int, drawn: int = 0) -> None:
        self._generator, self._samples, self._drawn = generator, samples, drawn

    def again(self) -> "Masks":
        """The same masks from here on."""
        return Masks(self._generator, self._samples, self._drawn)

    def drop(self, values: torch.Tensor, rate: float, *, samples: bool = False) -> torch.Tensor:
        """Put zeros in the place of a share `rate` of the values (B, ...) and divide the rest by 1 - rate.

        `samples`: whole samples fall out together (drop-path).

        Raises:
            ValueError: the first dimension does not count the samples.
        """
        if len(values) != self._samples:
            raise ValueError(f"masks for {self._samples} samples cannot drop in {tuple(values.shape)}")
        shape = (len(values), *[1] * (values.ndim - 1)) if samples else values.shape
        keep = torch.empty(shape, dtype=values.dtype, device=values.device)
        first = draws.first_row(self._samples, self._generator)
        source = torch.Generator(values.device)
        for row, mask in enumerate(keep):
            source.manual_seed(_seed(self._generator.initial_seed(), self._drawn, first + row))
            mask.bernoulli_(1 - rate, generator=source)
        self._drawn += 1
        return values * keep / (1 - rate)


def _seed(*numbers: int) -> int:
    # A hash, because a CPU's generator keeps 32 bits of its seed, and seeds beside each other must not be alike.
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): a residual branch falls out for a whole sample."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...); unchanged where no masks are at work."""
        active = _ACTIVE.get()
        return branch if active is None or not self.rate else active.masks.drop(branch, self.rate, samples=True)


class _Dropping(TorchFunctionMode):
    """Within it `F.dropout` drops a share `rate` with our masks, whatever it is called with; at 0 it is left alone."""

    def __init__(self, masks: Masks, rate: float, *, repeated: bool = False) -> None:
        super().__init__()
        self.masks, self.rate = masks, rate
        self._start = masks.again() if repeated else None

    def __enter__(self) -> "_Dropping":
        if self._start is not None:
            self.masks = self._start.again()
        self._token = _ACTIVE.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._token)

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout and self.rate:
            return self.masks.drop(args[0], self.rate)
        return func(*args, **(kwargs or {}))


_ACTIVE: ContextVar[_Dropping | None] = ContextVar("active", default=None)


def dropping(masks: Masks | None, rate: float) -> AbstractContextManager[Any]:
    """Within it each `F.dropout` drops a share `rate`, and each `DropPath` its own; without masks nothing drops."""
    return contextlib.nullcontext() if masks is None else _Dropping(masks, rate)


def recomputed() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """torch's `checkpoint` asks for it before a block's forward pass: what is around that pass, and around the same
    pass when it is computed again, which must meet the same masks."""
    active = _ACTIVE.get()
    nothing = contextlib.nullcontext()
    return nothing, nothing if active is None else _Dropping(active.masks, active.rate, repeated=True)
