"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere (a log, Prefect, CI)."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_LINE_EVERY = 10.0  # seconds


class Meter:
    """Counts work done towards `total`; see `meter`."""

    def __init__(self, description: str, total: int, silent: bool = False) -> None:
        self._description, self._total, self._done, self._silent = description, total, 0, silent
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not silent:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(description, total=total, note="")

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and not self._silent:
            log.info("%s: %d done in %.0f s", self._description, self._done, time.monotonic() - self._start)

    def skip(self, done: int) -> None:
        """Count work that an earlier run did; the estimate of the remaining time ignores it."""
        self._done += done
        self._skipped = done
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    _skipped = 0

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more; `note` (a loss, a rate) is shown beside it."""
        self._done += amount
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY and not self._silent:
            self._last = now
            rate = (self._done - self._skipped) / (now - self._start)
            left = (self._total - self._done) / rate if rate else 0.0
            log.info("%s: %d/%d, %.0f s left %s", self._description, self._done, self._total, left, note)


@contextmanager
def meter(description: str, total: int, silent: bool = False) -> Iterator[Meter]:
    """Show progress of `total` units of work: `with meter("Encoding", n) as m: ... m.advance(k)`.

    `silent`: show nothing, because another process shows the progress.
    """
    with Meter(description, total, silent) as m:
        yield m
