"""The machine that a configuration is for, and whether both of its trainings fit there."""

from dataclasses import dataclass
from typing import Any, Literal

from vlv.config import Config, ConfigError, Paths, Stage1
from vlv.plan import count, gpus
from vlv.plan.forecast import Machine, Sharding, memory, per_gpu, usable
from vlv.training import launch

StageName = Literal["stage1", "stage2"]
STAGES: tuple[StageName, ...] = ("stage1", "stage2")
DEFAULT_GPU = "RTX 6000 Ada"  # the paper's; for a configuration that names none


def machine(settings: Config, paths: Paths, stage: StageName) -> Machine:
    """The GPUs of the section `compute`, shared as the stage's file in `compute.launch` says.

    Raises:
        UnknownGpuError: no such GPU in the table.
        ConfigError: no such file, or one that starts another number of processes than `compute.gpus`.
    """
    compute, launch_file = settings.compute, settings.compute.launch_of(stage)
    sharding: Sharding = "none"
    if launch_file is not None:
        plan = launch.read_launch_file(paths.root / launch_file)
        if plan["num_processes"] != compute.gpus:
            raise ConfigError(
                f"compute.gpus is {compute.gpus}, but {launch_file}, which {stage} is started with, has num_processes "
                f"{plan['num_processes']}: make them equal"
            )
        sharding = sharded(plan)
    return Machine(gpus.find(compute.gpu or DEFAULT_GPU), compute.gpus, sharding=sharding)


def sharded(plan: dict[str, Any]) -> Sharding:
    """What the processes of an accelerate file share."""
    if plan.get("distributed_type") != "FSDP":
        return "none"
    # Kept whole from the forward to the backward pass, what learns takes the memory that it takes in ZeRO-2.
    return "full" if plan.get("fsdp_config", {}).get("fsdp_reshard_after_forward", True) else "zero2"


def micro_batch(settings: Config, stage: StageName, machine: Machine) -> int:
    """Samples of the stage (an image counts once, whatever its draws) on one GPU at a time."""
    s = settings.stage1 if stage == "stage1" else settings.stage2
    samples = s.batch_size // s.draws_per_image if isinstance(s, Stage1) else s.batch_size
    return per_gpu(s, samples, machine.count)


@dataclass(frozen=True)
class Fit:
    """A stage's memory on its machine; `peak` and `usable` in bytes on one GPU."""

    stage: StageName
    machine: Machine
    micro_batch: int
    peak: int
    usable: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def fit(settings: Config, paths: Paths, stage: StageName, machine: Machine) -> Fit:
    """Simulate one step of the stage, for its memory alone."""
    micro = micro_batch(settings, stage, machine)
    if stage == "stage1":
        counted = count.stage1(settings, paths, "gpu", micro, flops=False)
    else:
        counted = count.stage2(settings, paths, "gpu", micro, flops=False)
    peak = memory(counted, micro, machine.count, machine.sharding).peak
    return Fit(stage, machine, micro, peak, usable(machine.gpu))
