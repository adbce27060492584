"""Where and at which price a training runs: nothing here changes what is computed."""

from typing import Annotated

from pydantic import Field

from vlv.config.base import Positive, Section


class LaunchByStage(Section):
    """An accelerate configuration file for each training stage; null: one process."""

    stage1: str | None = None
    stage2: str | None = None


class Compute(Section):
    """The machines. DVC does not track this section and no fingerprint holds it: a training that was stopped may
    go on elsewhere, and a finished one stays current."""

    gpu: str | None = Field(
        default=None,
        description="the GPU that the batch split and the precision are chosen for, by its name in "
        "vlv/plan/gpus.py; null: a CPU",
    )
    gpus: Positive = Field(default=1, description="how many of it; as many as the files in `launch` start processes")
    launch: str | LaunchByStage | None = Field(
        default=None,
        description="accelerate configuration file of this machine's processes (configs/accelerate), one for both "
        "trainings or one for each; null: one process",
    )
    patience_minutes: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="how long a process waits for the others before it gives up"
    )
    price_per_device_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="money, for the cost ledger; a device is a GPU, or a process on CPUs"
    )
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="operations/s of one device at the precision in use; null: no utilisation is given"
    )

    def launch_of(self, stage: str) -> str | None:
        """The accelerate file that `stage` is started with; None: one process."""
        if isinstance(self.launch, LaunchByStage):
            return {"stage1": self.launch.stage1, "stage2": self.launch.stage2}.get(stage)
        return self.launch
