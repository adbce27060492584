"""One real step of a stage at full size on this machine: a checkpoint, a resume and one more step, with forecast.

The step is the training loop's own, on new weights and one batch of noise; nothing is downloaded where the
configuration names an `architecture`. What is measured is what a long run will meet on this machine: whether it
fits, the time of a step, the size of a checkpoint and the time to write it and to go on from it.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from vlv.config import Config, Paths
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.plan import count, forecast, models
from vlv.plan.memory import PeakMemory
from vlv.plan.stand_ins import Target
from vlv.training import loop, runtime

GIB = forecast.GIB
M = TypeVar("M", Autoencoder, Captioner)
_SPARE = 0.05  # of the free memory, left to others


class TooLargeError(RuntimeError):
    """The step will not fit into this machine's free memory."""


@dataclass(frozen=True)
class Rehearsed:
    """What the two steps took.

    Attributes:
        build, first_step, save, resume, second_step: seconds. first_step holds the counting of operations.
        checkpoint: bytes on disk.
        peak: bytes, the most that the second step (optimizer there from its start) held beyond what the process
            held before; saving_peak: the same while a checkpoint was written.
        expected: the forecast of `peak`.
    """

    stage: str
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
        """All of it, and how far the peak was from its forecast."""
        return vars(self) | {"peak_over_forecast": round(self.peak / self.expected - 1, 4)}


def stage1(settings: Config, paths: Paths, samples: int = 1) -> Rehearsed:
    """Stage 1 for `samples` images at a time, each with its draws.

    Raises:
        TooLargeError: the forecast says that it does not fit.
    """
    s = settings.stage1
    device = runtime.join()

    def batch(model: Autoencoder, pictures: torch.Tensor) -> Stage1Batch:
        cached: dict[str, torch.Tensor] = {}
        if s.cache_latents:
            cached["latent_mean"], cached["latent_std"] = model.decoder.encode(pictures)
        if s.cache_features:
            cached["features"] = model.encoder.features(pictures)
        return Stage1Batch(None if s.cache_latents and s.cache_features else pictures, **cached)

    counted = count.stage1(settings, paths, _target(device), samples)
    return _rehearse(Autoencoder, batch, counted, settings, paths, samples, device)


def stage2(settings: Config, paths: Paths, samples: int = 1) -> Rehearsed:
    """Stage 2 for `samples` pairs at a time, their captions of the longest allowed length.

    Raises:
        TooLargeError: the forecast says that it does not fit.
    """
    s = settings.stage2
    device = runtime.join()

    def batch(model: Captioner, pictures: torch.Tensor) -> Stage2Batch:
        words = model.language_model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, words, (samples, s.max_caption_tokens), generator=torch.Generator().manual_seed(s.seed))
        if s.learn != "mlp+llm+encoder":
            return Stage2Batch(model.context(pictures), ids, ids)
        if s.cache_features:
            return Stage2Batch(None, ids, ids, features=model.encoder.features(pictures))
        return Stage2Batch(None, ids, ids, pictures)

    counted = count.stage2(settings, paths, _target(device), samples)
    return _rehearse(Captioner, batch, counted, settings, paths, samples, device)


def _target(device: torch.device) -> Target:
    return "gpu" if device.type == "cuda" else "cpu"


def _noise(settings: Config, samples: int) -> torch.Tensor:
    size = settings.data.image_size
    generator = torch.Generator().manual_seed(settings.stage1.seed)
    return torch.randint(0, 256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)


def _expected(stage: count.Stage, device: torch.device, samples: int) -> int:
    """Bytes that the step will hold at most.

    Raises:
        TooLargeError: more than are free.
    """
    peak = forecast.memory(stage, samples).peak
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if peak > free * (1 - _SPARE):
        raise TooLargeError(
            f"{stage.name} needs {peak / GIB:.1f} GiB for {samples} samples at a time, and {free / GIB:.1f} GiB are "
            f"free here. What frees how much: vlv plan (gradient_checkpointing, frozen_precision, what learns)."
        )
    return peak


def _rehearse(
    kind: type[M],
    batch: Callable[[M, torch.Tensor], object],
    counted: count.Stage,
    settings: Config,
    paths: Paths,
    samples: int,
    device: torch.device,
) -> Rehearsed:
    """Train a new model of `kind` for a step, and a second one from that step's checkpoint for one more."""
    expected = _expected(counted, device, samples)
    stage, configured = counted.name, counted.settings
    fixed = {"accumulation": 1, "checkpoint_every": 1, "log_every": 1}
    fixed["batch_size"] = samples * (configured.batch_size // counted.samples)  # an image counts once for each draw
    clock = _Clock()
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="vlv-rehearsal-") as folder, PeakMemory(device) as memory:

        def train(steps: int) -> None:
            model = kind.build(models.without_weights(settings), paths)
            models.set_prompt(model.encoder, settings.encoder.prompt)
            model.to(device)
            clock.note("built")
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=configured.precision == "bf16")
            with torch.no_grad(), bf16:
                given = batch(model, _noise(settings, samples).to(device))
            clock.note("prepared")

            def batches(step: int) -> Iterator[object]:
                clock.note("ready")
                memory.restart()
                yield given

            def on_log(step: int, values: dict[str, float]) -> None:
                clock.note("stepped")
                clock.peaks["step"] = memory.peak()
                memory.restart()

            training = configured.model_copy(update={**fixed, "steps": steps})
            loop.train(model, batches, training, Path(folder), stage, on_log, f"Rehearsal of {stage}")
            clock.note("saved")
            clock.peaks["save"] = max(memory.peak(), clock.peaks.get("save", 0))

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


class _Clock:
    """When things happened (seconds) and how much memory they took (bytes)."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def note(self, what: str) -> None:
        self.times[what] = time.monotonic()
