"""Where a training runs, and at which price. Nothing here changes what is computed."""

from typing import Annotated

from pydantic import Field

from vlv.config.section import Positive, Section


class LaunchByStage(Section):
    """An accelerate configuration file for each training stage; null: one process."""

    stage1: str | None = Field(default=None, description="file for Stage 1")
    stage2: str | None = Field(default=None, description="file for Stage 2")


class Compute(Section):
    """The machines. DVC does not track this section, and it is part of no input hash: a stopped training may resume on
    other machines, and a finished one stays current."""

    gpu: str | None = Field(
        default=None,
        description="name in vlv/plan/gpus.py of the GPU that the batch split and the precision are chosen for,"
        " or null for a CPU",
    )
    gpus: Positive = Field(
        default=1, description="number of these GPUs; equal to the number of processes in the files of `launch`"
    )
    launch: str | LaunchByStage | None = Field(
        default=None,
        description="accelerate file with the processes of this machine (configs/accelerate), one for both trainings "
        "or one for each; null: one process",
    )
    timeout_minutes: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="how long a process waits for the others at the start, before it ends with an error"
    )
    price_per_device_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="for the cost ledger, in any currency; a device is a GPU, or a process on CPUs"
    )
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="operations/s of one device at the precision in use; null: no utilisation is reported"
    )

    def launch_of(self, stage: str) -> str | None:
        """The accelerate file that `stage` is started with; None: one process."""
        if isinstance(self.launch, LaunchByStage):
            return {"stage1": self.launch.stage1, "stage2": self.launch.stage2}.get(stage)
        return self.launch
