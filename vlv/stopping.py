"""Being asked to stop: the error that says so, and a process that ends when the one that started it is gone."""

import os
import signal
import threading
import time

_LOOK_SECONDS = 0.5
_SAVE_SECONDS = 30.0  # to save after the SIGTERM, before the process is made to end


class Stopped(RuntimeError):
    """The work was asked to stop; its state is saved and the same command goes on with it. Not a failure."""


def end_with(parent: int, name: str) -> None:
    """Send this process SIGTERM once `parent`, which is its parent now, is no more; end it 30 s later."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SAVE_SECONDS)
        os._exit(1)

    threading.Thread(target=follow, name=name, daemon=True).start()
