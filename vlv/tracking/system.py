"""The load of the machine during a run, from MLflow's own monitors, as curves named system/..."""

import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from vlv.tracking.run import Run

log = logging.getLogger(__name__)

SECONDS = 10.0  # between samples


def sample(run: "Run", ended: threading.Event, seconds: float = SECONDS) -> None:
    """Log processor, memory and (where there is one) GPU load until `ended` is set."""
    monitors = _monitors()
    process = psutil.Process()
    psutil.cpu_percent()  # the first answer is always 0
    memory = "system/process_memory_megabytes"
    step = run.next_step(memory)
    while not ended.wait(seconds):
        values = {memory: process.memory_info().rss / 1e6}
        for monitor in monitors:
            monitor.collect_metrics()
            values.update({f"system/{key}": value for key, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        run.log_metrics(values, step)
        step += 1


def _monitors() -> list[Any]:
    found: list[Any] = []
    for module, name in (("cpu_monitor", "CPUMonitor"), ("gpu_monitor", "GPUMonitor")):
        try:
            found.append(getattr(importlib.import_module(f"mlflow.system_metrics.metrics.{module}"), name)())
        except (ImportError, RuntimeError) as error:  # no nvidia-ml-py, or no GPU
            log.debug("No curves from %s: %s", name, error)
    return found
