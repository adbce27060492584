"""One trial: a `vlv` command in a process of its own, and whether it held.

The process is forked from one that has done the imports, so that a trial takes a moment and not ten seconds. A command
holds if it succeeds, or ends with one line that begins with "Error:". A traceback, a signal or a time-out does not.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlv.cli import main as cli

_MEMORY = 6 << 30  # bytes of address space beyond what the imports have taken
# Done; `vlv doctor` found a problem; an error that is named; a refused promotion; pictures that are listed as failed.
_ENDED_WELL = {0, 1, 2, 3, cli.SOME_FAILED, cli.ALL_FAILED}


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code`: None where it ran out of time; negative: the signal that killed it."""

    code: int | None
    output: str
    seconds: float

    @property
    def held(self) -> bool:
        """Whether it ended well, or with an error that it named."""
        counted = self.code in (cli.SOME_FAILED, cli.ALL_FAILED) and "failed:" in self.output
        named = self.code in (0, 1) or counted or "Error" in self.output
        return self.code in _ENDED_WELL and named and "Traceback (most recent call last)" not in self.output


@dataclass
class Tally:
    """Counts of one part of the campaign, and each trial that did not hold."""

    name: str
    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, what: str, held: bool, why: str) -> None:
        """Count one trial."""
        self.tried += 1
        self.held += held
        if not held:
            self.failures.append(f"{what}: {why}")

    def judge(self, what: str, outcome: Outcome, wrong: str | None = None) -> None:
        """Count a command; `wrong`: what else is wrong with what it left, if something is."""
        last = (outcome.output.strip().splitlines() or ["no output"])[-1][:200]
        why = "ran out of time" if outcome.code is None else f"exit code {outcome.code}: {last}"
        self.count(what, outcome.held and wrong is None, wrong if outcome.held and wrong else why)


def warm() -> None:
    """Do the imports that trials share."""
    import torch

    torch.set_num_threads(1)


def vlv(arguments: Sequence[str], project: Path, seconds: float = 120.0) -> Outcome:
    """Run `vlv ARGUMENTS` in `project`, with "y" typed at standard input."""
    from vlv.cli import main as cli

    return forked(lambda: cli.app(list(arguments)), project, seconds)


def forked(action: Callable[[], object], project: Path, seconds: float) -> Outcome:
    """Run `action` in a child process, with its output in a file; no process of its group is left afterwards."""
    log = project / ".campaign.log"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(action, project, log)
    status = _wait(child, start + seconds)
    output = log.read_text(encoding="utf-8", errors="replace")
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Outcome(code, output, time.monotonic() - start)


def _in_child(action: Callable[[], object], project: Path, log: Path) -> None:
    code = 1
    try:
        os.setsid()
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        answers, typing = os.pipe()
        os.write(typing, b"y\n" * 100)
        os.close(typing)
        for number, source in enumerate((answers, sink, sink)):
            os.dup2(source, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(project)
        os.environ["VLV_ROOT"] = str(project)
        limit = _address_space() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        action()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 70  # no exit code of ours
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def _wait(child: int, deadline: float) -> int | None:
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.01)
        return None
    finally:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        else:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.waitpid(child, 0)
