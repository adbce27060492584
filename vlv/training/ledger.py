"""What a training costs: time of devices, samples, arithmetic, energy, money. Summed over sessions: a kill counts.

The sums lie beside the checkpoints. Samples and arithmetic that a kill made void were paid for as well, so they
are in. What was spent after the last line of the curve before a kill is not.
"""

import time
from pathlib import Path
from typing import Any

from vlv import files
from vlv.config import Compute
from vlv.training.energy import EnergyMeter

NAME = "ledger.json"


class Ledger:
    """The running sums of one training.

    Attributes:
        flops_per_step: operations of one optimizer step over all processes (a multiply-add counts two), None
            until they were counted.
    """

    def __init__(self, folder: Path, devices: int) -> None:
        self._path = folder / NAME
        past: dict[str, Any] = files.read_json(self._path) if self._path.exists() else {}
        self._past = past
        self.flops_per_step: int | None = past.get("flops_per_step")
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
            energy += past.get("energy_joules") or 0.0
        seconds = time.monotonic() - self._start
        files.write_json(
            self._path,
            {
                "sessions": past.get("sessions", 0) + 1,
                "device_seconds": past.get("device_seconds", 0.0) + seconds * self._devices,
                "samples": past.get("samples", 0) + self._samples,
                "flops": past.get("flops", 0) + self._steps * (self.flops_per_step or 0),
                "flops_per_step": self.flops_per_step,
                "energy_joules": energy,
            },
        )


def costs(folder: Path, compute: Compute) -> dict[str, Any]:
    """The finished training's costs, as they go to metrics/STAGE.json.

    `utilisation` is operations / (device seconds x peak); it, `energy_joules` and `money` are null where the
    peak is not configured, no counter can be read, no price is configured.
    """
    sums: dict[str, Any] = files.read_json(folder / NAME)
    seconds = sums["device_seconds"]
    utilisation = money = None
    if compute.peak_flops and seconds:
        utilisation = round(sums["flops"] / (seconds * compute.peak_flops), 4)
    if compute.price_per_device_hour is not None:
        money = round(seconds / 3600 * compute.price_per_device_hour, 4)
    energy = sums["energy_joules"]
    return {
        "sessions": sums["sessions"],
        "device_seconds": round(seconds, 1),
        "samples": sums["samples"],
        "flops": sums["flops"],
        "utilisation": utilisation,
        "energy_joules": None if energy is None else round(energy, 1),
        "money": money,
    }
