"""Energy that this machine used, where its counters can be read: RAPL (processors) and NVML (NVIDIA GPUs)."""

import importlib
import logging
from pathlib import Path
from typing import Any

from vlv.io import files

log = logging.getLogger(__name__)

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of the whole machine, whoever used it.

    Args:
        rapl: the kernel's folder of power zones; each package has energy_uj (microjoules, wraps around at
            max_energy_range_uj). On most machines only root may read it.
    """

    def __init__(self, rapl: Path = _RAPL) -> None:
        self._packages = {
            zone: value for zone in sorted(rapl.glob("intel-rapl:?")) if (value := _read(zone)) is not None
        }
        self._gpus = _gpus()
        self._last_gpus = self._gpu_joules()
        self._joules = 0.0

    def joules(self) -> float | None:
        """The sum of all counters; None where none can be read. To be asked at least every half hour (RAPL wraps)."""
        if not self._packages and not self._gpus:
            return None
        for zone, before in self._packages.items():
            now = _read(zone)
            if now is None:
                continue
            wrapped = _read(zone, "max_energy_range_uj") or 0
            self._joules += (now - before if now >= before else now - before + wrapped) / 1e6
            self._packages[zone] = now
        gpus = self._gpu_joules()
        self._joules += gpus - self._last_gpus
        self._last_gpus = gpus
        return self._joules

    def _gpu_joules(self) -> float:
        millijoules = [int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for nvml, handle in self._gpus]
        return sum(millijoules) / 1e3


def _read(zone: Path, name: str = "energy_uj") -> int | None:
    try:
        return int(files.read_text(zone / name))
    except (OSError, ValueError):
        return None


def _gpus() -> list[tuple[Any, Any]]:
    """NVML and a handle for each GPU that counts its energy."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        found = [(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
        for _, handle in found:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no nvidia-ml-py, no driver, no GPU, a GPU without a counter: NVML has a class for each
        log.debug("No energy of GPUs: %s", error)
        return []
    return found
