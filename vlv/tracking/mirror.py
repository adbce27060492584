"""An optional copy of a training's curve for Weights & Biases, through accelerate's tracker. MLflow stays the record.

The mirror lives in a thread of its own: a service that is slow, dead or knows no such account holds no training up,
and whatever goes wrong there is one warning. Offline by default: the run lies in work/wandb, and no account is asked
for before `wandb sync`.
"""

import importlib.util
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlv.config import ConfigError, Paths, Tracking

log = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0  # how long the end of a training waits for the mirror


class Mirror:
    """Takes points of a curve and returns at once."""

    def __init__(self) -> None:
        self._points: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One point on each named curve."""
        if self._thread is not None:
            self._points.put((step, dict(values)))

    def _begin(self, project: str, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        self._thread = threading.Thread(
            target=self._deliver, args=(project, parameters, options), name="vlv-wandb", daemon=True
        )
        self._thread.start()

    def _deliver(self, project: str, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        from accelerate.tracking import WandBTracker

        # The tracker wants accelerate's state, which the training makes: so not before the first point.
        point = self._points.get()
        if point is None:
            return
        try:
            tracker = WandBTracker(project, **options)
            tracker.start()
            tracker.store_init_configuration(parameters)
            while point is not None:
                step, values = point
                tracker.log(values, step=step)
                point = self._points.get()
            tracker.finish()
        except Exception as error:  # the mirror must not spoil the training
            log.warning("The Weights & Biases mirror stopped; the training goes on without it: %r", error)

    def _end(self) -> None:
        if self._thread is None:
            return
        self._points.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("Weights & Biases does not answer; the rest of the curve is in work/wandb and in MLflow")


@contextmanager
def mirrored(
    settings: Tracking, paths: Paths, name: str, identity: str, parameters: dict[str, Any]
) -> Iterator[Mirror]:
    """A mirror for the `with` block; without `wandb_project` one that does nothing.

    Args:
        identity: of the training; a resumed one goes on with the same run.

    Raises:
        ConfigError: a project is configured, but wandb is not installed.
    """
    mirror = Mirror()
    if settings.wandb_project is None:
        yield mirror
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking.wandb_project needs wandb: pip install 'vlv[wandb]', or set it to null")
    folder = paths.work / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "name": name, "id": identity, "resume": "allow", "dir": str(folder),
        "mode": "online" if settings.wandb_online else "offline",
        "settings": {"console": "off", "silent": True, "x_disable_stats": True},  # MLflow has the machine's course
    }  # fmt: skip
    mirror._begin(settings.wandb_project, parameters, options)
    try:
        yield mirror
    finally:
        mirror._end()
