"""Stopping on request: the error for it, and a way to end a process when the process that started it is gone."""

import os
import signal
import threading
import time

import psutil

_LOOK_SECONDS = 0.5
_DVC_STAGE = "DVC_STAGE"  # DVC sets it for the processes that it starts


class Stopped(RuntimeError):
    """The work was asked to stop. Its state is saved, and the same command continues it. Not a failure."""


def end_with(process: psutil.Process, seconds: float) -> None:
    """Send this process SIGTERM when `process` has ended, and kill it if it still runs `seconds` later."""

    def follow() -> None:
        while _runs(process):
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        _end_after(seconds)

    threading.Thread(target=follow, name="vlv-end-with", daemon=True).start()


def end_with_dvc(seconds: float = 300.0) -> None:
    """Call `end_with` for the DVC that started this process, if any: a killed DVC leaves its stages running.

    A shell between the two does not end with DVC either.
    """
    if _DVC_STAGE not in os.environ:
        return
    for ancestor in psutil.Process().parents():
        try:
            if _DVC_STAGE not in ancestor.environ():
                end_with(ancestor, seconds)
                return
        except psutil.Error:  # it has ended, or belongs to another user: then it is not DVC
            return


def terminated(_number: int, _frame: object) -> None:
    """A handler for SIGTERM: an ordinary exit with 143, so that context managers close; killed if that takes long."""
    threading.Thread(target=_end_after, args=(60.0,), name="vlv-terminated", daemon=True).start()
    raise SystemExit(128 + signal.SIGTERM)


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(128 + signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
