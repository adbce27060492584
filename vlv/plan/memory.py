"""Memory of a stage on one GPU: by kind, its peak, and what each setting would free."""

import math
from dataclasses import dataclass

from vlv.plan.count import Activations, Stage
from vlv.plan.gpus import Gpu, Machine, Sharding

# Share of a GPU's memory that a training cannot use: the CUDA context and gaps between the allocator's blocks.
RESERVE = 0.08
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by kind.

    Attributes:
        buckets: DDP's copy of the gradients.
        kept: activations between the forward and the backward pass.
        peak: the most bytes at once. It is not the sum: gradients appear while activations are freed, and a step also
            holds temporary tensors.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    kept: int
    peak: int


def memory(stage: Stage, activations: Activations, gpus: int = 1, sharding: Sharding = "none") -> Memory:
    """Return the memory of a step with these activations on each of `gpus` GPUs."""
    gradients = trainable = 4 * stage.trainable  # float32
    optimizer = trainable * (3 if stage.settings.optimizer.ema_decay else 2)  # AdamW's two averages, in float32
    share = gpus if sharding != "none" else 1
    weights = stage.weights - trainable + trainable // (gpus if sharding == "full" else 1)
    buckets = gradients if gpus > 1 and sharding == "none" else 0
    own = gradients // share
    step = max(activations.peak - (gradients - own), activations.kept, own)
    peak = weights + optimizer // share + buckets + step
    return Memory(weights, own, optimizer // share, buckets, activations.kept, peak)


def usable(gpu: Gpu) -> int:
    """Return the bytes that a training may use."""
    return int(gpu.memory * GIB * (1 - RESERVE))


def knobs(stage: Stage, machine: Machine) -> list[str]:
    """Return sentences that say what each setting would free on a GPU; only for settings counted with `knobs`."""
    if stage.half is None and stage.activations.samples > 1:
        return []
    gpus, sharding = machine.count, machine.sharding
    now = memory(stage, stage.activations, gpus, sharding).peak
    found = []

    def add(knob: str, peak: int) -> None:
        if now - peak > GIB // 100:
            found.append(f"{knob}: {(now - peak) / GIB:.1f} GiB less")

    if stage.with_recomputation:
        add(f"{stage.name}.gradient_checkpointing: true", memory(stage, stage.with_recomputation, gpus, sharding).peak)
    if stage.half:
        add(
            f"{stage.name}.accumulation: {stage.settings.accumulation * 2}",
            memory(stage, stage.half, gpus, sharding).peak,
        )  # fmt: skip
    if gpus > 1 and sharding == "none":
        add(
            "FSDP with fsdp_reshard_after_forward: false",
            memory(stage, stage.activations, gpus, "zero2").peak,
        )
    samples = stage.activations.samples
    if (largest := largest_micro_batch(stage, machine)) < samples:
        times = math.ceil(samples / largest) if largest else 0
        found.append(
            f"the largest micro-batch that fits is {largest}: multiply accumulation by {times}"
            if largest
            else "a micro-batch of one sample does not fit either"
        )
    return found


def largest_micro_batch(stage: Stage, machine: Machine) -> int:
    """Return the largest micro-batch, up to the counted one, that fits; 0: none."""
    for samples in range(stage.activations.samples, 0, -1):
        held = memory(stage, _at(stage, samples), machine.count, machine.sharding)
        if held.peak <= usable(machine.gpu):
            return samples
    return 0


def _at(stage: Stage, samples: int) -> Activations:
    """The activations of `samples` samples, on the line through the two counts."""
    whole, half = stage.activations, stage.half
    if samples == whole.samples or half is None:
        return whole

    def line(at_half: int, at_whole: int) -> int:
        return at_whole - (at_whole - at_half) * (whole.samples - samples) // (whole.samples - half.samples)

    return Activations(samples, line(half.kept, whole.kept), line(half.peak, whole.peak))
