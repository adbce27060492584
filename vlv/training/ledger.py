"""What a training costs: time of devices, samples, arithmetic, energy, money. Summed over sessions: a kill counts.

The sums lie beside the checkpoints. Samples and arithmetic that a kill made void were paid for as well, so they
are in. What was spent after the last line of the curve before a kill is not.
"""

import time
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vlv.config import Compute, Section
from vlv.io import files
from vlv.training.energy import EnergyMeter

NAME = "ledger.json"


class Sums(Section):
    """What ledger.json holds.

    Attributes:
        sessions: how often the training was started.
        flops_per_step: operations of one optimizer step over all processes (a multiply-add counts two), None
            until they were counted.
    """

    sessions: int = Field(default=0, ge=0)
    device_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    samples: int = Field(default=0, ge=0)
    flops: int = Field(default=0, ge=0)
    flops_per_step: int | None = Field(default=None, gt=0)
    energy_joules: float | None = Field(default=None, allow_inf_nan=False)


class Ledger:
    """The running sums of one training.

    Attributes:
        flops_per_step: operations of one optimizer step over all processes (a multiply-add counts two), None
            until they were counted.
    """

    def __init__(self, folder: Path, devices: int) -> None:
        self._path = folder / NAME
        self._past = _read(self._path)
        self.flops_per_step = self._past.flops_per_step
        self._devices = devices
        self._start, self._meter = time.monotonic(), EnergyMeter()
        self._samples = self._steps = 0

    def add_step(self, samples: int) -> None:
        """Count one optimizer step of so many samples."""
        self._samples += samples
        self._steps += 1

    def write(self) -> None:
        """Put the sums so far on disk."""
        past, energy = self._past, self._meter.joules()
        if energy is not None:
            energy += past.energy_joules or 0.0
        seconds = time.monotonic() - self._start
        sums = Sums(
            sessions=past.sessions + 1,
            device_seconds=past.device_seconds + seconds * self._devices,
            samples=past.samples + self._samples,
            flops=past.flops + self._steps * (self.flops_per_step or 0),
            flops_per_step=self.flops_per_step,
            energy_joules=energy,
        )
        files.write_json(self._path, sums.model_dump())


def _read(path: Path) -> Sums:
    if not path.exists():
        return Sums()
    try:
        return Sums.model_validate(files.read_json_object(path))
    except (files.FileError, ValidationError) as error:
        known = error if isinstance(error, files.FileError) else f"{path} holds no sums of a training."
        files.set_aside(path, known, "what was spent before is not in the costs")
        return Sums()


def costs(folder: Path, compute: Compute) -> dict[str, Any]:
    """The finished training's costs, as they go to metrics/STAGE.json.

    `utilisation` is operations / (device seconds x peak); it, `energy_joules` and `money` are null where the
    peak is not configured, no counter can be read, no price is configured.
    """
    sums = _read(folder / NAME)
    seconds = sums.device_seconds
    utilisation = money = None
    if compute.peak_flops and seconds:
        utilisation = round(sums.flops / (seconds * compute.peak_flops), 4)
    if compute.price_per_device_hour is not None:
        money = round(seconds / 3600 * compute.price_per_device_hour, 4)
    energy = sums.energy_joules
    return {
        "sessions": sums.sessions,
        "device_seconds": round(seconds, 1),
        "samples": sums.samples,
        "flops": sums.flops,
        "utilisation": utilisation,
        "energy_joules": None if energy is None else round(energy, 1),
        "money": money,
    }
