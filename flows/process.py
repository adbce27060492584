"""Child processes of the flow: they run in the project folder, pass on their output live and leave nothing behind."""

import codecs
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from vlv.io import files

GRACE_SECONDS = 20.0  # a trainer saves in this time; Prefect's worker itself waits 30 s before it kills
_LINGER_SECONDS = 2.0  # for a pipe that a leftover grandchild keeps open
_KILLED_SECONDS = 5.0  # for the kernel to remove killed processes
_PROGRESS_SECONDS = 5.0  # a progress bar's line is passed on this often at most
_TAIL_LINES = 200
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    returncode: int
    tail: tuple[str, ...]  # its last lines, oldest first


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    say: Callable[[str], None],
    grace: float = GRACE_SECONDS,
) -> Ended:
    """Run `command` in a session of its own and hand each line of its output to `say` as it comes.

    However this function ends (normally, by an exception, a timeout, a cancel or Ctrl-C), the child and all its
    descendants are gone afterwards: they get SIGTERM, and what is left after `grace` seconds gets SIGKILL.
    """
    process = subprocess.Popen(
        list(command),
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    lines = _Lines(say)
    try:
        _follow(process, lines)
        return Ended(process.wait(), tuple(lines.tail))
    finally:
        _end(process, grace)
        lines.close()
        if process.stdout is not None:
            process.stdout.close()


class _Lines:
    """Cuts bytes into lines. Passes on every line that ends with \\n, and rarely one with \\r (a progress bar)."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._say = say
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self._last_progress = 0.0

    def feed(self, data: bytes) -> None:
        parts = re.split(r"(\r\n|\n|\r)", self._rest + self._decoder.decode(data))
        self._rest = parts.pop()
        for text, ending in zip(parts[::2], parts[1::2], strict=True):
            if ending == "\r":
                now = time.monotonic()
                if now - self._last_progress < _PROGRESS_SECONDS:
                    continue
                self._last_progress = now
            self._tell(text)

    def close(self) -> None:
        self._tell(self._rest)
        self._rest = ""

    def _tell(self, text: str) -> None:
        clean = _ANSI.sub("", text).rstrip()
        if clean:
            self.tail.append(clean)
            self._say(clean)


def _follow(process: subprocess.Popen[bytes], lines: _Lines) -> None:
    """Read until the pipe closes, or until shortly after the child itself has ended."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    ended_at: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.5):
                data = os.read(descriptor, 65536)
                if not data:
                    return
                lines.feed(data)
            if process.poll() is not None:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > _LINGER_SECONDS:
                    return


def _alive(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The child, its descendants and everything in its process group; zombies left out."""
    found: dict[int, psutil.Process] = {}
    try:
        if process.poll() is None:
            child = psutil.Process(process.pid)
            found = {p.pid: p for p in (child, *child.children(recursive=True))}
    except psutil.NoSuchProcess:
        pass
    for other in psutil.process_iter():
        try:
            if os.getpgid(other.pid) == process.pid:
                found[other.pid] = other
        except (ProcessLookupError, PermissionError):
            continue
    return [p for p in found.values() if _runs(p)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End what is left of the child's tree. A second interrupt during the grace time kills at once."""
    left = _alive(process)
    try:
        if left:
            _signal(left, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and (process.poll() is None or any(map(_runs, left))):
                time.sleep(0.1)
    finally:
        killed = [p for p in {*left, *_alive(process)} if _runs(p)]
        _signal(killed, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(killed, timeout=_KILLED_SECONDS)


# DVC's advice after each stage. It is right, but noise in a log that people read while it grows.
_ADVICE = ("To track the changes", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")

Outcome = Literal["ran", "restored", "current"]

_EXITED = re.compile(r"exited with (-?\d+)")


class CommandFailed(RuntimeError):
    """A child ended with an error. The message ends with its last lines."""

    def __init__(self, what: str, ended: Ended) -> None:
        self.returncode = _inner_code(ended)
        last = "\n".join(f"  {line}" for line in ended.tail[-12:])
        super().__init__(f"{what} failed (exit code {self.returncode}). Its last lines:\n{last}")

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it (out of memory, a stopped machine) and not an error of its own."""
        return self.returncode < 0 or self.returncode > 128


def _inner_code(ended: Ended) -> int:
    """The exit code of the stage, which DVC only prints; if it prints none, the child's."""
    for line in reversed(ended.tail):
        if line.startswith("ERROR") and (found := _EXITED.search(line)):
            return int(found.group(1))
    return ended.returncode


@dataclass(frozen=True)
class Project:
    """A project folder, as the place where children run.

    `variables` are added to a child's environment: the ids that tie its MLflow run to the flow's.
    """

    root: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """This process's environment, with this Python first in PATH, because dvc.yaml says `python`."""
        here = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "VLV_ROOT": str(self.root),
            **variables,
        }

    def python(self, *arguments: str, say: Callable[[str], None], **variables: str) -> Ended:
        """Run `python ARGUMENTS` to its end. Raises `CommandFailed`."""
        command = [sys.executable, *arguments]
        ended = run(command, cwd=self.root, env=self.environment(**variables), say=say)
        if ended.returncode != 0:
            raise CommandFailed(" ".join(arguments), ended)
        return ended

    def stale(self, say: Callable[[str], None]) -> set[str]:
        """The stages that DVC finds changed now, without those that depend on them. Writes nothing."""
        ended = self.python("-m", "dvc", "status", "--json", say=lambda line: None)
        try:
            said = next(line for line in ended.tail if line.startswith("{"))
            status = files.parse_json(said, "the answer of dvc status")
        except (StopIteration, files.FileError) as error:
            raise CommandFailed("dvc status", ended) from error
        for name, reasons in status.items():
            say(f"{name}: {json.dumps(reasons)}")
        return {name for name in status if not name.endswith(".dvc")}

    def reproduce(self, stage: str, say: Callable[[str], None], **variables: str) -> Outcome:
        """Run `dvc repro` for one stage. Returns whether it ran, came from DVC's run cache, or was current."""
        outcomes: list[Outcome] = []

        def listen(line: str) -> None:
            if line.startswith(f"Running stage '{stage}'"):
                outcomes.append("ran")
            elif line.startswith(f"Stage '{stage}' is cached"):
                outcomes.append("restored")
            if not line.lstrip().startswith(_ADVICE):
                say(line)

        self.python("-m", "dvc", "repro", "--single-item", stage, say=listen, **variables)
        return outcomes[0] if outcomes else "current"
