"""Random numbers and dropout masks that do not depend on how a batch is divided.

A batch may be divided over processes and micro-batches in many ways. To give a sample the same noise and the same
timestep in all of them, random numbers are generated for the whole batch and each part keeps its own rows.
Generating the other rows costs little compared with a training step (10 ns per number).

Dropout: torch takes its masks from the process's global generator, so a resumed training, or one with another number
of processes, would use other masks. Here the masks are a function of (seed, step, index of the sample in the whole
batch). Models stay in evaluation mode, in which torch's dropout does nothing. Values are dropped only where the
forward pass of a training gets `Masks`. Masks are generated on the device: a CPU and a GPU give different ones.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class PartGenerator(torch.Generator):
    """A CPU generator that knows which part of the batch its numbers are for.

    Args:
        seed: determines the numbers, together with the order in which they are generated.
        part, parts: this is part `part` of `parts` equal, contiguous parts of the batch.
    """

    def __new__(cls, seed: int, part: int = 0, parts: int = 1) -> "PartGenerator":
        return super().__new__(cls)

    def __init__(self, seed: int, part: int = 0, parts: int = 1) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"there is no part {part} among {parts}")
        self.part, self.parts = part, parts
        self.manual_seed(seed)


def rows(count: int, generator: torch.Generator, generate: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """This part's `count` rows of the numbers that `generate` gives for the whole batch.

    `generate(n)` returns n rows from `generator`. With a plain generator the part is the whole batch.
    """
    if not isinstance(generator, PartGenerator) or generator.parts == 1:
        return generate(count)
    first = first_row(count, generator)
    return generate(count * generator.parts)[first : first + count]


def first_row(count: int, generator: torch.Generator) -> int:
    """The index in the whole batch of the first of this part's `count` rows."""
    return generator.part * count if isinstance(generator, PartGenerator) else 0


def normal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers of `shape`, whose first dimension counts this part's rows; on the generator's device."""
    device = generator.device
    return rows(shape[0], generator, lambda n: torch.randn((n, *shape[1:]), generator=generator, device=device))


class Masks:
    """The masks of one forward pass, in the order of the calls.

    Args:
        generator: the step's generator. Only its seed and its part of the batch are read.
        samples: how many samples this part has.
        used: how many masks were used before.
    """

    def __init__(self, generator: torch.Generator, samples: int, used: int = 0) -> None:
        self._generator, self._samples, self._used = generator, samples, used

    def again(self) -> "Masks":
        """The same masks from here on."""
        return Masks(self._generator, self._samples, self._used)

    def drop(self, values: torch.Tensor, rate: float, *, samples: bool = False) -> torch.Tensor:
        """Replace a share `rate` of the values (B, ...) by zeros and divide the rest by 1 - rate.

        `samples`: drop whole samples (drop-path).

        Raises:
            ValueError: the first dimension is not the number of samples.
        """
        if len(values) != self._samples:
            raise ValueError(f"masks for {self._samples} samples cannot drop in {tuple(values.shape)}")
        shape = (len(values), *[1] * (values.ndim - 1)) if samples else values.shape
        keep = torch.empty(shape, dtype=values.dtype, device=values.device)
        first = first_row(self._samples, self._generator)
        source = torch.Generator(values.device)
        for row, mask in enumerate(keep):
            source.manual_seed(_seed(self._generator.initial_seed(), self._used, first + row))
            mask.bernoulli_(1 - rate, generator=source)
        self._used += 1
        return values * keep / (1 - rate)


def _seed(*numbers: int) -> int:
    # A hash, because a CPU generator keeps 32 bits of its seed, and neighbouring seeds must give unrelated numbers.
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drops a residual branch for a whole sample."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...); unchanged without active masks."""
        active = _ACTIVE.get()
        return branch if active is None or not self.rate else active.masks.drop(branch, self.rate, samples=True)


class _Dropping(TorchFunctionMode):
    """Within it `F.dropout` drops a share `rate` with our masks, whatever its arguments; at 0 it is unchanged."""

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
    """The contexts of a block's forward pass and of its recomputation, for torch's `checkpoint`; both use the same
    masks."""
    active = _ACTIVE.get()
    nothing = contextlib.nullcontext()
    return nothing, nothing if active is None else _Dropping(active.masks, active.rate, repeated=True)
