"""Two real steps of a stage at full size on this machine, with a checkpoint and a resume between them.

The steps are those of the training loop, on a model with new weights and a batch of noise. Nothing is downloaded if
the configuration names an `architecture`. The rehearsal measures what a long run will need here: whether it fits, the
time of a step, the size of a checkpoint, and the time to write it and to resume from it.
"""

import gc
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from vlv.config import Config, Paths
from vlv.plan import count, step
from vlv.plan.memory import GIB, memory
from vlv.plan.step import StageName
from vlv.training import blocks, distributed, loop

_SPARE = 0.05  # share of the free memory that is left for other programs
_SECONDS = 0.01  # between two measurements of this process's memory; filling a large block takes longer


class TooLargeError(RuntimeError):
    """The step will not fit into this machine's free memory."""


@dataclass(frozen=True)
class Rehearsed:
    """The measurements of the two steps.

    Attributes:
        build, first_step, save, resume, second_step: seconds. first_step includes counting the operations.
        checkpoint: bytes on disk.
        peak: bytes, the most that the second step held beyond what the process held before. In the second step the
            optimizer's averages exist from the start.
        saving_peak: the same while a checkpoint was written.
        expected: the forecast of `peak`.
    """

    stage: StageName
    device: str
    samples: int
    build: float
    first_step: float
    save: float
    resume: float
    second_step: float
    checkpoint: int
    peak: int
    saving_peak: int
    expected: int

    def as_json(self) -> dict[str, Any]:
        """All values, and the relative error of the forecast."""
        return vars(self) | {"peak_over_forecast": round(self.peak / self.expected - 1, 4)}

    def table(self) -> Table:
        """The times, the sizes and the forecast."""
        table = Table(
            title=f"{self.stage} on {self.device}, micro-batch {self.samples}", title_justify="left", show_header=False
        )
        table.add_column()
        table.add_column(justify="right")
        for what, seconds in (
            ("build", self.build), ("first step, with the count", self.first_step), ("write checkpoint", self.save),
            ("resume from it", self.resume), ("second step", self.second_step),
        ):  # fmt: skip
            table.add_row(what, f"{seconds:,.1f} s")
        table.add_section()
        table.add_row("checkpoint", f"{self.checkpoint / GIB:,.2f} GiB")
        table.add_row("peak of the second step", f"{self.peak / GIB:,.2f} GiB")
        off = self.peak / self.expected - 1
        table.add_row("forecast", f"{self.expected / GIB:,.2f} GiB; the peak is {off:+.1%} from it")
        table.add_row("peak while writing", f"{self.saving_peak / GIB:,.2f} GiB")
        return table


def rehearse(settings: Config, paths: Paths, stage: StageName, samples: int = 1) -> Rehearsed:
    """Train a new model for one step, and a second new model from that step's checkpoint for one more.

    Args:
        samples: size of the micro-batch: images (each with its noise draws) in Stage 1, pairs in Stage 2.

    Raises:
        TooLargeError: by the forecast it does not fit.
    """
    device = distributed.join()
    expected = _expected(settings, paths, stage, samples, device)
    configured = step.section(settings, stage)
    draws = configured.batch_size // step.samples_in_step(settings, stage)
    one = {"accumulation": 1, "checkpoint_every": 1, "log_every": 1, "batch_size": samples * draws}
    clock = _Clock()
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="vlv-rehearsal-") as folder, PeakMemory(device) as used:

        def train(steps: int) -> None:
            model = step.build(settings, paths, stage).to(device)
            clock.note("built")
            with blocks.autocast(device, configured.precision):
                batch = step.batch(model, settings, _noise(settings, samples).to(device))
            clock.note("prepared")

            def batches(first: int) -> Iterator[object]:
                clock.note("ready")
                used.restart()
                yield batch

            def on_log(number: int, values: dict[str, float]) -> None:
                clock.note("stepped")
                clock.peaks["step"] = used.peak()
                used.restart()

            training = configured.model_copy(update={**one, "steps": steps})
            loop.train(model, batches, training, Path(folder), stage, on_log, f"Rehearsal of {stage}")
            clock.note("saved")
            clock.peaks["save"] = max(used.peak(), clock.peaks.get("save", 0))

        start = time.monotonic()
        train(1)
        first = dict(clock.times)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        gc.collect()
        train(2)
    second = clock.times
    return Rehearsed(
        stage=stage, device=str(device), samples=samples,
        build=round(first["built"] - start, 2),
        first_step=round(first["stepped"] - first["ready"], 2),
        save=round(first["saved"] - first["stepped"], 2),
        resume=round(second["ready"] - second["prepared"], 2),
        second_step=round(second["stepped"] - second["ready"], 2),
        checkpoint=size, peak=clock.peaks["step"], saving_peak=clock.peaks["save"], expected=expected,
    )  # fmt: skip


def _expected(settings: Config, paths: Paths, stage: StageName, samples: int, device: torch.device) -> int:
    """The most bytes that the step will hold.

    Raises:
        TooLargeError: more than are free.
    """
    cuda = device.type == "cuda"
    counted = count.stage(settings, paths, stage, "gpu" if cuda else "cpu", samples)
    peak = memory(counted, counted.activations).peak
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if peak > free * (1 - _SPARE):
        raise TooLargeError(
            f"{stage} needs {peak / GIB:.1f} GiB for {samples} samples at a time, and {free / GIB:.1f} GiB are free "
            f"here. vlv plan says how much each setting frees (gradient_checkpointing, frozen_precision, trainable)."
        )
    return peak


def _noise(settings: Config, samples: int) -> torch.Tensor:
    size = settings.data.image_size
    generator = torch.Generator().manual_seed(settings.stage1.seed)
    return torch.randint(0, 256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)


class _Clock:
    """The times of events (seconds) and the memory they took (bytes)."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def note(self, what: str) -> None:
        self.times[what] = time.monotonic()


class PeakMemory:
    """Measures the most bytes in use since `restart`, minus the bytes in use when it was created.

    On a GPU torch's allocator knows the peak. On a CPU a thread reads this process's anonymous memory. Mapped files,
    such as weights that are being read, do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._measure, daemon=True)
        self._before = self._most = self._now()

    def __enter__(self) -> "PeakMemory":
        if not self._cuda:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._ended.set()
        if self._watch.is_alive():
            self._watch.join()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._most = self._now()

    def peak(self) -> int:
        """Return bytes."""
        most = torch.cuda.max_memory_allocated() if self._cuda else max(self._most, self._now())
        return most - self._before

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated()
        used = psutil.Process().memory_info()
        return int(used.rss - getattr(used, "shared", 0))

    def _measure(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._most = max(self._most, self._now())
