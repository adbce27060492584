"""Folders that are made once per test session, by the test process that asks first."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def once(name: str, temporary: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make(folder)` filled, the same one in all test processes of this session.

    The others wait while one makes it. It is shared: copy it before changing anything in it.
    """
    base = temporary.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # each process has a folder of its own below the session's
    folder, done = base / name, base / f"{name}.done"
    with filelock.FileLock(base / f"{name}.lock"):
        if not done.exists():
            if folder.exists():  # a maker that failed
                shutil.rmtree(folder)
            make(folder)
            done.touch()
    return folder
