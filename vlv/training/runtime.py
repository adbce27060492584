"""Processes, devices, precision and signals around the training loop."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from vlv.config import Training

log = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The training was asked to stop; its state is saved and the same command continues it."""


def accelerator(settings: Training) -> Accelerator:
    """Accelerate with the configured precision; reads the launcher's environment for more processes."""
    runtime = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        gradient_accumulation_steps=settings.accumulation,
    )
    set_seed(settings.seed)
    return runtime


def generator(seed: int, step: int, device: torch.device | str = "cpu", stream: int = 0) -> torch.Generator:
    """Randomness as a function of (seed, step, stream): a resumed run draws the same numbers."""
    mixed = (seed * 1_000_003 + step) * 4_096 + stream
    return torch.Generator(device=device).manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying at once; a second SIGINT raises as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("%s received: saving, then leaving", signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
