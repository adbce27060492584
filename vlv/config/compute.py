"""Where and at which price a training runs: nothing here changes what is computed."""

from typing import Annotated

from pydantic import Field

from vlv.config.base import Section


class Compute(Section):
    """The machines. DVC does not track this section and no fingerprint holds it: a training that was stopped may
    go on elsewhere, and a finished one stays current."""

    launch: str | None = Field(
        default=None,
        description="accelerate configuration file of this machine's processes (configs/accelerate); null: one process",
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
