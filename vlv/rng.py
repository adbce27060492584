"""Random numbers of a global batch, of which each process and each micro-batch takes its own rows.

A batch may be divided over processes and micro-batches in many ways. So that a sample meets the same noise and
the same timestep in all of them, numbers are drawn for the whole batch and each part keeps its rows. Drawing
what others keep costs little beside a training step (10 ns a number); a generator for each sample would cost no
more, but one process would then draw other numbers than it always did.
"""

from collections.abc import Callable, Sequence

import torch


class PartGenerator(torch.Generator):
    """A CPU generator that knows which part of the batch it draws for.

    Args:
        seed: decides the numbers, together with the order in which they are drawn.
        part, parts: this is part `part` of `parts` equal, contiguous parts of the batch.
    """

    def __new__(cls, seed: int, part: int = 0, parts: int = 1) -> "PartGenerator":
        return super().__new__(cls)

    def __init__(self, seed: int, part: int = 0, parts: int = 1) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"there is no part {part} among {parts}")
        self.part, self.parts = part, parts
        self.manual_seed(seed)


def rows(count: int, generator: torch.Generator, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """This part's `count` rows of what `draw` gives for all rows of the batch.

    `draw(n)` returns n rows from `generator`. With a plain generator the part is the whole.
    """
    if not isinstance(generator, PartGenerator) or generator.parts == 1:
        return draw(count)
    first = first_row(count, generator)
    return draw(count * generator.parts)[first : first + count]


def first_row(count: int, generator: torch.Generator) -> int:
    """The place in the whole batch of the first of this part's `count` rows."""
    return generator.part * count if isinstance(generator, PartGenerator) else 0


def normal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers of `shape`, whose first dimension counts this part's rows; on the generator's device."""
    device = generator.device
    return rows(shape[0], generator, lambda n: torch.randn((n, *shape[1:]), generator=generator, device=device))
