"""Commands in the project folder: their environment, their failures, and what DVC says of its stages."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows import process as child
from vlv.io import files

# DVC's advice after each stage: true, and noise in a log that is read while it grows.
_ADVICE = ("To track the changes", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")

Outcome = Literal["ran", "restored", "current"]

_EXITED = re.compile(r"exited with (-?\d+)")


class CommandFailed(RuntimeError):
    """A child ended with an error; the message ends with its last lines."""

    def __init__(self, what: str, ended: child.Ended) -> None:
        self.returncode = _inner_code(ended)
        last = "\n".join(f"  {line}" for line in ended.tail[-12:])
        super().__init__(f"{what} failed (exit code {self.returncode}). Its last lines:\n{last}")

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it (out of memory, a stopped machine), not its own verdict."""
        return self.returncode < 0 or self.returncode > 128


def _inner_code(ended: child.Ended) -> int:
    """The stage's own exit code, which DVC only tells in words; else the child's."""
    for line in reversed(ended.tail):
        if line.startswith("ERROR") and (found := _EXITED.search(line)):
            return int(found.group(1))
    return ended.returncode


@dataclass(frozen=True)
class Project:
    """A project folder, as the place where children run.

    `marks` are variables that every child gets: the ids that tie its records to the flow's.
    """

    root: Path

    def environment(self, **marks: str) -> dict[str, str]:
        """This process's environment with this Python first in PATH: dvc.yaml says plainly `python`."""
        here = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "VLV_ROOT": str(self.root),
            **marks,
        }

    def python(self, *arguments: str, say: Callable[[str], None], **marks: str) -> child.Ended:
        """Run `python ARGUMENTS` to its end. Raises `CommandFailed`."""
        command = [sys.executable, *arguments]
        ended = child.run(command, cwd=self.root, env=self.environment(**marks), say=say)
        if ended.returncode != 0:
            raise CommandFailed(" ".join(arguments), ended)
        return ended

    def stale(self, say: Callable[[str], None]) -> set[str]:
        """Stages that DVC finds changed now (those after them are not among them). Reads, writes nothing."""
        ended = self.python("-m", "dvc", "status", "--json", say=lambda line: None)
        try:
            said = next(line for line in ended.tail if line.startswith("{"))
            status = files.parse_json(said, "the answer of dvc status")
        except (StopIteration, files.FileError) as error:
            raise CommandFailed("dvc status", ended) from error
        for name, reasons in status.items():
            say(f"{name}: {json.dumps(reasons)}")
        return {name for name in status if not name.endswith(".dvc")}

    def reproduce(self, stage: str, say: Callable[[str], None], **marks: str) -> Outcome:
        """`dvc repro` for one stage: whether it ran, came from DVC's run cache, or was current."""
        outcomes: list[Outcome] = []

        def listen(line: str) -> None:
            if line.startswith(f"Running stage '{stage}'"):
                outcomes.append("ran")
            elif line.startswith(f"Stage '{stage}' is cached"):
                outcomes.append("restored")
            if not line.lstrip().startswith(_ADVICE):
                say(line)

        self.python("-m", "dvc", "repro", "--single-item", stage, say=listen, **marks)
        return outcomes[0] if outcomes else "current"
