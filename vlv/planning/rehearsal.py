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
from typing import Any

import psutil
import torch
from torch import nn

from vlv.config import Config, Paths, Stage2, Training
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.planning import count, forecast, models
from vlv.planning.memory import PeakMemory
from vlv.training import loop, runtime

GIB = forecast.GIB
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

    def build() -> Autoencoder:
        model = Autoencoder.build(models.without_weights(settings), paths)
        models.set_prompt(model.encoder, settings.encoder.prompt)
        return model

    def batch(model: nn.Module) -> Stage1Batch:
        assert isinstance(model, Autoencoder)
        pictures = _noise(settings, samples).to(device)
        cached: dict[str, torch.Tensor] = {}
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            if s.cache_latents:
                cached["latent_mean"], cached["latent_spread"] = model.decoder.encode(pictures)
            if s.cache_features:
                cached["features"] = model.encoder.features(pictures)
        return Stage1Batch(None if s.cache_latents and s.cache_features else pictures, **cached)

    expected = _expected(lambda target: count.stage1(settings, paths, target, samples), device, samples)
    return _rehearse("stage1", build, batch, s, samples * s.draws_per_image, device, expected)


def stage2(settings: Config, paths: Paths, samples: int = 1) -> Rehearsed:
    """Stage 2 for `samples` pairs at a time, their captions of the longest allowed length.

    Raises:
        TooLargeError: the forecast says that it does not fit.
    """
    s = settings.stage2
    device = runtime.join()

    def build() -> Captioner:
        model = Captioner.build(models.without_weights(settings), paths)
        models.set_prompt(model.encoder, settings.encoder.prompt)
        return model

    def batch(model: nn.Module) -> Stage2Batch:
        assert isinstance(model, Captioner)
        return _pairs(model, settings, s, samples, device)

    expected = _expected(lambda target: count.stage2(settings, paths, target, samples), device, samples)
    return _rehearse("stage2", build, batch, s, samples, device, expected)


def _pairs(model: Captioner, settings: Config, s: Stage2, samples: int, device: torch.device) -> Stage2Batch:
    pictures = _noise(settings, samples).to(device)
    words = model.language_model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, words, (samples, s.max_caption_tokens), generator=torch.Generator().manual_seed(s.seed))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        if s.learn != "mlp+llm+encoder":
            return Stage2Batch(model.context(pictures), ids, ids)
        features = model.encoder.features(pictures) if s.cache_features else None
    return Stage2Batch(None, ids, ids, pictures if features is None else None, features)


def _noise(settings: Config, samples: int) -> torch.Tensor:
    size = settings.data.image_size
    generator = torch.Generator().manual_seed(settings.stage1.seed)
    return torch.randint(0, 256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)


def _expected(counted: Callable[[Any], count.Stage], device: torch.device, samples: int) -> int:
    """Bytes that the step will hold at most.

    Raises:
        TooLargeError: more than are free.
    """
    stage = counted("gpu" if device.type == "cuda" else "cpu")
    peak = forecast.memory(stage, samples).peak
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if peak > free * (1 - _SPARE):
        raise TooLargeError(
            f"{stage.name} needs {peak / GIB:.1f} GiB for {samples} samples at a time, and {free / GIB:.1f} GiB are "
            f"free here. What frees how much: vlv plan (gradient_checkpointing, frozen_precision, what learns)."
        )
    return peak


def _rehearse(
    stage: str,
    build: Callable[[], nn.Module],
    batch: Callable[[Any], object],
    configured: Training,
    samples: int,
    device: torch.device,
    expected: int,
) -> Rehearsed:
    clock = _Clock()
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="vlv-rehearsal-") as folder, PeakMemory(device) as memory:

        def train(steps: int) -> None:
            changed = {"batch_size": samples, "accumulation": 1, "steps": steps, "checkpoint_every": 1, "log_every": 1}
            model = build().to(device)
            clock.note("built")
            given = batch(model)
            clock.note("prepared")

            def batches(step: int) -> Iterator[object]:
                clock.note("ready")
                memory.restart()
                yield given

            def on_log(step: int, values: dict[str, float]) -> None:
                clock.note("stepped")
                clock.peaks["step"] = memory.peak()
                memory.restart()

            settings = configured.model_copy(update=changed)
            loop.train(model, batches, settings, Path(folder), stage, on_log, f"Rehearsal of {stage}")
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
