"""Being asked to stop: the error that says so, and a process that ends when the one that started it is gone."""

import os
import signal
import threading
import time

import psutil

_LOOK_SECONDS = 0.5
_DVC_STAGE = "DVC_STAGE"  # DVC names the stage to what it starts


class Stopped(RuntimeError):
    """The work was asked to stop; its state is saved and the same command goes on with it. Not a failure."""


def end_with(process: psutil.Process, seconds: float) -> None:
    """Send this process SIGTERM once `process` is no more, and make it end if it is still there `seconds` later."""

    def follow() -> None:
        while _runs(process):
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        _end_after(seconds)

    threading.Thread(target=follow, name="vlv-end-with", daemon=True).start()


def end_with_dvc(seconds: float = 300.0) -> None:
    """`end_with` the DVC that started this process, if one did: killed, DVC leaves what it started running.

    There may be a shell in between, which does not end with DVC either.
    """
    if _DVC_STAGE not in os.environ:
        return
    for ancestor in psutil.Process().parents():
        try:
            if _DVC_STAGE not in ancestor.environ():
                end_with(ancestor, seconds)
                return
        except psutil.Error:  # gone, or another user's: then it is not DVC
            return


def terminated(_number: int, _frame: object) -> None:
    """A handler for SIGTERM: an ordinary exit with 143, so that context managers close. It is made sure of."""
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
