"""What a training costs: device time, samples, operations and money, summed over its sessions.

A session is one start of the training. The sums are stored beside the checkpoints. They include steps that a kill
lost, because these cost money too. They do not include the cost between the last line of the curve and a kill.
"""

import time
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vlv.config import Compute, Section
from vlv.io import files

NAME = "ledger.json"


class Sums(Section):
    """The contents of ledger.json.

    Attributes:
        sessions: number of starts of the training.
        device_seconds: wall time x processes.
        flops_per_step: operations of one optimizer step over all processes (a multiply-add counts as two); None
            until they are counted.
    """

    sessions: int = Field(default=0, ge=0)
    device_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    samples: int = Field(default=0, ge=0)
    flops: int = Field(default=0, ge=0)
    flops_per_step: int | None = Field(default=None, gt=0)


class Ledger:
    """The running sums of one training.

    Attributes:
        flops_per_step: operations of one optimizer step over all processes (a multiply-add counts as two); None
            until they are counted.
    """

    def __init__(self, folder: Path, devices: int) -> None:
        self._path = folder / NAME
        self._past = _read(self._path)
        self.flops_per_step = self._past.flops_per_step
        self._devices = devices
        self._start = time.monotonic()
        self._samples = self._steps = 0

    def add_step(self, samples: int) -> None:
        """Count one optimizer step of `samples` samples (over all processes)."""
        self._samples += samples
        self._steps += 1

    def write(self) -> None:
        """Write the sums so far to disk."""
        past = self._past
        seconds = time.monotonic() - self._start
        sums = Sums(
            sessions=past.sessions + 1,
            device_seconds=past.device_seconds + seconds * self._devices,
            samples=past.samples + self._samples,
            flops=past.flops + self._steps * (self.flops_per_step or 0),
            flops_per_step=self.flops_per_step,
        )
        files.write_json(self._path, sums.model_dump())


def _read(path: Path) -> Sums:
    if not path.exists():
        return Sums()
    try:
        return Sums.model_validate(files.read_json_object(path))
    except (files.FileError, ValidationError) as error:
        known = error if isinstance(error, files.FileError) else f"{path} does not hold the sums of a training."
        files.set_aside(path, known, "the costs do not include what was spent before")
        return Sums()


def costs(folder: Path, compute: Compute) -> dict[str, Any]:
    """The costs of a finished training, as they go to metrics/STAGE.json.

    `utilisation` is operations / (device seconds x `peak_flops`). It is null without a configured `peak_flops`, and
    `money` is null without a configured price.
    """
    sums = _read(folder / NAME)
    seconds = sums.device_seconds
    utilisation = money = None
    if compute.peak_flops and seconds:
        utilisation = round(sums.flops / (seconds * compute.peak_flops), 4)
    if compute.price_per_device_hour is not None:
        money = round(seconds / 3600 * compute.price_per_device_hour, 4)
    return {
        "sessions": sums.sessions,
        "device_seconds": round(seconds, 1),
        "samples": sums.samples,
        "flops": sums.flops,
        "utilisation": utilisation,
        "money": money,
    }
