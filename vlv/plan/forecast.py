"""From counts to what a person asks: does it fit, how long does it take, what does it cost, which knob helps."""

import math
from dataclasses import dataclass
from typing import Literal

from vlv.config import Training
from vlv.plan.count import Line, Stage
from vlv.plan.gpus import Gpu

Sharding = Literal["none", "zero2", "full"]

# Share of a GPU's memory that a training cannot use: the CUDA context and what the allocator leaves between blocks.
RESERVE = 0.08
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What the training runs on.

    Attributes:
        utilisation: FLOPs of the step / (time x peak); element-wise work, copies and waiting all lower it.
        price: dollars for one GPU and hour; None: not asked.
        sharding: none (DDP: everything on every GPU), zero2 (gradients and optimizer split over the GPUs),
            full (weights that learn as well: ZeRO-3, FSDP).
    """

    gpu: Gpu
    count: int
    utilisation: float = 0.35
    price: float | None = None
    sharding: Sharding = "none"
    tf32: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by kind, and `peak`, the most there are at once.

    The peak is not the sum: gradients appear while activations go, and a step also holds what it needs for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Forecast:
    """A stage on a machine.

    Attributes:
        micro_batch: samples on one GPU at a time.
        hours, dollars: of the whole training.
        cache_bytes: disk space that the caches of all images take.
    """

    stage: Stage
    machine: Machine
    micro_batch: int
    memory: Memory
    fits: bool
    hours: float
    dollars: float | None
    prepare_hours: float
    cache_bytes: int
    knobs: list[str]


def forecast(stage: Stage, machine: Machine, images: int) -> Forecast:
    """Forecast `stage` on `machine`; caches are filled for `images` different images beforehand.

    Raises:
        UnknownGpuError: the GPU lacks the configured precision.
    """
    micro = micro_batch(stage, machine)
    used = memory(stage, micro, machine.count, machine.sharding)
    rate = machine.count * machine.gpu.peak(stage.settings.precision, tf32=machine.tf32) * machine.utilisation
    hours = stage.settings.steps * stage.samples * stage.flops / rate / 3600
    prepare = images * stage.prepared_flops / rate / 3600
    dollars = None if machine.price is None else (hours + prepare) * machine.count * machine.price
    return Forecast(
        stage,
        machine,
        micro,
        used,
        used.peak <= usable(machine.gpu),
        hours,
        dollars,
        prepare,
        images * stage.stored,
        knobs(stage, machine),
    )


def usable(gpu: Gpu) -> int:
    """Bytes that a training may use."""
    return int(gpu.memory * GIB * (1 - RESERVE))


def per_gpu(settings: Training, samples: int, count: int) -> int:
    """Samples on one GPU at a time: a step's samples over processes and accumulation."""
    return math.ceil(samples / settings.accumulation / count)


def micro_batch(stage: Stage, machine: Machine) -> int:
    """Samples of this stage on one GPU at a time."""
    return per_gpu(stage.settings, stage.samples, machine.count)


def memory(
    stage: Stage, micro: int, count: int = 1, sharding: Sharding = "none", *, recompute: bool | None = None
) -> Memory:
    """By kind, on one of `count` devices; `recompute`: gradient checkpointing on or off (None: as configured)."""
    kept = sum(_kept(m.kept_whole, m.kept_recomputed, m.kept, recompute).at(micro) for m in stage.modules)
    gradients = 4 * stage.learning
    optimizer = 4 * stage.learning * (3 if stage.settings.optimizer.ema_decay else 2)  # AdamW's two averages, in fp32
    share = count if sharding != "none" else 1
    learned = 4 * stage.learning
    weights = stage.weights - learned + learned // (count if sharding == "full" else 1)
    # DDP copies the gradients into buckets of their own.
    buckets = gradients if count > 1 and sharding == "none" else 0
    held = weights + optimizer // share + buckets
    configured = sum(m.kept.at(micro) for m in stage.modules)
    live = stage.live.at(micro) - (configured - kept) - (gradients - gradients // share)
    peak = held + max(live, kept, gradients // share)
    return Memory(weights, gradients // share, optimizer // share, buckets, kept, peak)


def _kept(whole: Line, recomputed: Line, configured: Line, recompute: bool | None) -> Line:
    return configured if recompute is None else recomputed if recompute else whole


def knobs(stage: Stage, machine: Machine) -> list[str]:
    """What each knob frees on a GPU, in sentences."""
    micro = micro_batch(stage, machine)
    count, sharding = machine.count, machine.sharding
    now = memory(stage, micro, count, sharding).peak
    result = []

    def say(knob: str, bytes_: int) -> None:
        if now - bytes_ > GIB // 100:
            result.append(f"{knob}: {(now - bytes_) / GIB:.1f} GiB less")

    if not stage.settings.gradient_checkpointing:
        say(f"{stage.name}.gradient_checkpointing: true", memory(stage, micro, count, sharding, recompute=True).peak)
    if micro > 1:
        twice = stage.settings.accumulation * 2
        say(f"{stage.name}.accumulation: {twice}", memory(stage, math.ceil(micro / 2), count, sharding).peak)
    if count > 1 and sharding == "none":
        say("ZeRO-2 (gradients and optimizer split)", memory(stage, micro, count, "zero2").peak)
    largest = _largest(stage, machine)
    if largest == 0:
        result.append("one sample at a time does not fit either")
    elif largest < micro:
        result.append(f"the largest micro-batch that fits is {largest}: accumulation {math.ceil(micro / largest)} "
                      f"times what it is")  # fmt: skip
    return result


def _largest(stage: Stage, machine: Machine) -> int:
    """The largest micro-batch up to the configured one that fits; 0: none."""
    low, high = 0, micro_batch(stage, machine)
    while low < high:  # memory grows with the batch
        middle = (low + high + 1) // 2
        if memory(stage, middle, machine.count, machine.sharding).peak <= usable(machine.gpu):
            low = middle
        else:
            high = middle - 1
    return low
