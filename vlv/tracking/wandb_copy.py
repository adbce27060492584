"""An optional copy of a training's curves in Weights & Biases, made by accelerate's tracker. MLflow keeps the record.

The copy is made in a thread of its own: a slow or dead service, or an unknown account, does not delay the training, and
any failure there is one warning. Offline by default: the run lies in work/wandb, and no account
is needed before `wandb sync`.
"""

import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlv.config import ConfigError, Paths, Tracking

log = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0  # how long the end of a training waits for the copy

_Points = queue.SimpleQueue[tuple[int, Mapping[str, float]] | None]


@contextmanager
def wandb_copy(
    settings: Tracking, paths: Paths, name: str, identity: str, parameters: Mapping[str, Any]
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield a function that takes a step and its values, and returns at once.

    Args:
        settings: without `wandb_project` the function does nothing.
        identity: of the training; a resumed one continues the same run.

    Raises:
        ConfigError: a project is configured, but wandb is not installed.
    """
    if settings.wandb_project is None:
        yield lambda step, values: None
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking.wandb_project needs wandb: pip install 'vlv[wandb]', or set it to null")
    folder = paths.work / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "name": name, "id": identity, "resume": "allow", "dir": str(folder),
        "mode": "online" if settings.wandb_online else "offline",
        "settings": {"console": "off", "silent": True, "x_disable_stats": True},  # MLflow has the system metrics
    }  # fmt: skip
    points: _Points = queue.SimpleQueue()
    arguments = (points, settings.wandb_project, options, parameters)
    thread = threading.Thread(target=_send, args=arguments, name="vlv-wandb", daemon=True)
    thread.start()
    try:
        yield lambda step, values: points.put((step, values))
    finally:
        points.put(None)
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("Weights & Biases does not answer; the rest of the curve is in work/wandb and in MLflow")


def _send(points: _Points, project: str, options: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    from accelerate.tracking import WandBTracker

    # The tracker needs accelerate's state, which the training makes, so this waits for the first point.
    point = points.get()
    if point is None:
        return
    try:
        tracker = WandBTracker(project, **options)
        tracker.start()
        tracker.store_init_configuration(dict(parameters))
        while point is not None:
            step, values = point
            tracker.log(dict(values), step=step)
            point = points.get()
        tracker.finish()
    except Exception as error:  # the copy must not spoil the training
        log.warning("The copy for Weights & Biases stopped; the training continues without it: %r", error)
