"""The outbox: journals whose process is gone and that MLflow has not been told completely."""

import logging
from dataclasses import dataclass
from pathlib import Path

from vlv.config import Paths
from vlv.io.files import LockHeldError
from vlv.tracking import delivery, journal, store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlushReport:
    """What `flush_outbox` did: runs delivered, journals that still wait, and why the first of them does."""

    delivered: int
    waiting: list[Path]
    reason: str | None = None


def folder(paths: Paths) -> Path:
    """Where journals lie. Not in the cache: until delivered they are the only record."""
    return store.store_folder(paths) / "outbox"


def outbox_state(paths: Paths) -> list[Path]:
    """Journals that hold something undelivered and have no living writer. Contacts nobody."""
    waiting = []
    for one in journal.journals(folder(paths)):
        try:
            opened = journal.Journal.open(one)
        except (LockHeldError, FileNotFoundError):
            continue
        try:
            if opened.run_id is None or opened.pending(most=1):
                waiting.append(one)
        finally:
            opened.release()
    return waiting


def flush_outbox(paths: Paths) -> FlushReport:
    """Deliver what dead runs left behind. A run whose process was killed is marked KILLED.

    Journals of living runs are left alone. After the first failure the other journals of the same server
    are not tried.
    """
    if not journal.journals(folder(paths)):
        return FlushReport(0, [])
    store.prepare(paths)
    delivered, waiting, reason = 0, [], None
    dead: set[str] = set()
    for one in journal.journals(folder(paths)):
        try:
            opened = journal.Journal.open(one)
        except (LockHeldError, FileNotFoundError):
            continue
        try:
            if opened.head.uri in dead:
                waiting.append(one)
                continue
            delivered += _flush(opened)
        except delivery.Unreachable as error:
            dead.add(opened.head.uri)
            waiting.append(one)
            reason = reason or str(error)
        finally:
            opened.release()
    return FlushReport(delivered, waiting, reason)


def _flush(opened: journal.Journal) -> int:
    """Deliver one journal; 1 where there was something to deliver."""
    entries = opened.entries()
    if not entries or entries[-1]["op"] != "finish":
        opened.append("finish", status="KILLED")
    new = bool(opened.pending(most=1))
    delivery.deliver(opened)
    if not opened.resumable():
        opened.remove()
    if new:
        log.info("Delivered what run %s had left in the outbox", opened.run_id)
    return int(new)
