"""A child process of the flow: its lines arrive at once, and no process is left behind."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows import process as child

# A parent whose child has its own session; the parent prints both ids. `stubborn` ignores SIGTERM.
_FAMILY = """
import os, pathlib, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("ids", os.getpid(), other.pid, flush=True)
time.sleep(600)
"""


def _run(code: str) -> tuple[child.Ended, list[str]]:
    lines: list[str] = []
    ended = child.run([sys.executable, "-c", code], cwd=Path.cwd(), env=os.environ, say=lines.append)
    return ended, lines


def test_lines_arrive_whole_and_progress_bars_are_thinned() -> None:
    code = (
        "import sys, time\n"
        "sys.stdout.write('one\\ntw'); sys.stdout.flush(); time.sleep(0.3)\n"
        "sys.stdout.write('o \\u00e9\\r\\n'); sys.stdout.flush()\n"
        "for i in range(50): sys.stdout.write(f'\\x1b[1mbar {i}\\r')\n"
        "sys.stdout.write('bar done\\n'); sys.stderr.write('no newline'); sys.exit(7)\n"
    )
    ended, lines = _run(code)
    assert ended.returncode == 7
    assert [line for line in lines if "bar" not in line] == ["one", "two é", "no newline"]
    assert [line for line in lines if "bar" in line] == ["bar 0", "bar done"]


def test_lines_arrive_while_the_child_runs() -> None:
    told: list[float] = []
    code = "import time\nfor _ in range(3): print('x', flush=True); time.sleep(0.6)"
    child.run([sys.executable, "-c", code], cwd=Path.cwd(), env=os.environ, say=lambda _: told.append(time.time()))
    assert len(told) == 3 and told[2] - told[0] > 0.8


@pytest.mark.parametrize("mood", ["meek", "stubborn"])
def test_an_exception_ends_the_child_and_its_descendants(mood: str) -> None:
    ids: list[int] = []

    def say(line: str) -> None:
        ids.extend(map(int, line.split()[1:]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.run([sys.executable, "-c", _FAMILY, mood], cwd=Path.cwd(), env=os.environ, say=say, grace=2.0)
    assert len(ids) == 2
    assert not [one for one in ids if psutil.pid_exists(one) and psutil.Process(one).status() != "zombie"]


def test_processes_left_in_a_childs_group_end_with_it() -> None:
    code = (
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(other.pid, flush=True)\n"
    )
    start = time.monotonic()
    ended, lines = _run(code)
    assert ended.returncode == 0
    assert time.monotonic() - start < 60  # that process keeps the pipe open, and we must not wait for it
    pid = int(lines[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
