"""GPUs: published data of each kind, and the machine that a configuration names.

Rates are dense (data sheets with 2:4 sparsity state twice as much) and for matrix products that accumulate in
float32, as in training.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vlv.config import Config, ConfigError, Paths, Precision
from vlv.plan.step import StageName, samples_in_step, section
from vlv.training import launch

Sharding = Literal["none", "zero2", "full"]
DEFAULT_GPU = "RTX 6000 Ada"  # the paper's; used if the configuration names none


class UnknownGpuError(ValueError):
    """The GPU is not in the table, or it lacks the requested precision."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: GiB.
        bf16, tf32, fp32: peak TFLOP/s; None if the hardware has no such unit. fp32 is the ordinary cores' rate.
        source: the document with these numbers.
    """

    name: str
    memory: float
    bf16: float | None
    tf32: float | None
    fp32: float
    source: str

    def has(self, precision: Precision, *, tf32: bool = False) -> bool:
        """Whether it has a unit for this precision."""
        return self._rate(precision, tf32) is not None

    def _rate(self, precision: Precision, tf32: bool) -> float | None:
        return self.bf16 if precision == "bf16" else self.tf32 if tf32 else self.fp32

    def peak(self, precision: Precision, *, tf32: bool = False) -> float:
        """Peak rate in FLOP/s at a training precision; `tf32`: float32 products run on the tensor cores.

        Raises:
            UnknownGpuError: this GPU has no such unit.
        """
        rate = self._rate(precision, tf32)
        if rate is None:
            what = "bf16" if precision == "bf16" else "tf32"
            raise UnknownGpuError(f"{self.name} has no {what} unit. Set the stages' precision to fp32, without --tf32.")
        return rate * 1e12


_ADA = "NVIDIA, Ada GPU architecture whitepaper V2"
_AMPERE = "NVIDIA, A100 data sheet"
_HOPPER = "NVIDIA, H100 data sheet (halved where it counts sparsity)"

GPUS = [
    # 1,457 TFLOPS of the data sheet are FP8 with sparsity: dense bf16 is a quarter of it, tf32 an eighth.
    Gpu("RTX 6000 Ada", 48, 364.2, 182.1, 91.1, "NVIDIA, RTX 6000 Ada Generation data sheet"),
    Gpu("L40S", 48, 362.05, 183.0, 91.6, "NVIDIA, L40S data sheet"),
    Gpu("RTX 4090", 24, 165.2, 82.6, 82.6, _ADA),
    Gpu("A100 40GB", 40, 312.0, 156.0, 19.5, _AMPERE),
    Gpu("A100 80GB", 80, 312.0, 156.0, 19.5, _AMPERE),
    Gpu("H100 SXM", 80, 989.4, 494.7, 66.9, _HOPPER),
    Gpu("H100 PCIe", 80, 756.5, 378.0, 51.0, _HOPPER),
    Gpu("V100 32GB", 32, None, None, 15.7, "NVIDIA, V100 data sheet (its 125 tensor TFLOPS are fp16)"),
]


def find(name: str) -> Gpu:
    """The GPU of this name; case, spaces and dashes do not matter.

    Raises:
        UnknownGpuError: not in the table.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for gpu in GPUS:
        if plain(gpu.name) == plain(name):
            return gpu
    raise UnknownGpuError(f"There is no GPU {name!r} in the table; there are: {', '.join(g.name for g in GPUS)}")


@dataclass(frozen=True)
class Machine:
    """The GPUs of a training.

    Attributes:
        count: number of GPUs, one process each.
        utilisation: FLOPs of the step / (time x peak rate). Element-wise work, copies and waiting all lower it.
        price: dollars per GPU hour; None: unknown.
        sharding: none (DDP: each GPU holds everything), zero2 (gradients and optimizer are sharded: FSDP with
            fsdp_reshard_after_forward false), full (the trainable weights are sharded too: FSDP).
        tf32: float32 products run on the tensor cores.
    """

    gpu: Gpu
    count: int
    utilisation: float = 0.35
    price: float | None = None
    sharding: Sharding = "none"
    tf32: bool = False

    def hours(self, flops: float, precision: Precision) -> float:
        """Return the time for `flops` FLOPs.

        Raises:
            UnknownGpuError: the GPU has no unit for this precision.
        """
        return flops / (self.count * self.gpu.peak(precision, tf32=self.tf32) * self.utilisation) / 3600

    def micro_batch(self, settings: Config, stage: StageName) -> int:
        """Return the samples per GPU at a time: a step's samples divided by processes and accumulation."""
        return math.ceil(samples_in_step(settings, stage) / section(settings, stage).accumulation / self.count)


def machine_of(settings: Config, paths: Paths, stage: StageName) -> Machine:
    """Return the GPUs of the section `compute`, with the sharding of the stage's file in `compute.launch`.

    Raises:
        UnknownGpuError: the table has no such GPU.
        ConfigError: the file is missing, or its number of processes is not `compute.gpus`.
    """
    compute, file = settings.compute, settings.compute.launch_of(stage)
    sharding: Sharding = "none"
    if file is not None:
        plan = launch.read_launch_file(paths.root / file)
        if plan["num_processes"] != compute.gpus:
            raise ConfigError(
                f"compute.gpus is {compute.gpus}, but {file}, which {stage} is started with, has num_processes "
                f"{plan['num_processes']}: make them equal"
            )
        sharding = sharding_of(plan)
    return Machine(find(compute.gpu or DEFAULT_GPU), compute.gpus, sharding=sharding)


def sharding_of(plan: dict[str, Any]) -> Sharding:
    """Return the sharding of an accelerate file."""
    if plan.get("distributed_type") != "FSDP":
        return "none"
    # Without resharding after the forward pass the weights stay unsharded from then on, as in ZeRO-2.
    return "full" if plan.get("fsdp_config", {}).get("fsdp_reshard_after_forward", True) else "zero2"
