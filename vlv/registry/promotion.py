"""Which version is champion: promotion, rollback, and the history of both."""

import getpass
import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import filelock

from vlv import tracking
from vlv.config import Paths
from vlv.io import files
from vlv.registry.policy import GATES, Candidate, load_policy
from vlv.registry.versions import (
    CHALLENGER,
    CHAMPION,
    RegistryError,
    explained,
    figures_of,
    version_with_alias,
)
from vlv.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Each entry of the history is a tag of its own, with a name that sorts by time. No entry is ever rewritten, so two
# people who promote at the same time cannot erase each other's entry.
_HISTORY = "vlv.history."


class PromotionRefused(RuntimeError):
    """Gates failed. The message lists them all; `failures` holds "gate: what is wrong" for each."""

    def __init__(self, message: str, failures: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


@dataclass(frozen=True)
class HistoryEntry:
    """One change of champion. Versions are None where there was no champion."""

    action: Literal["promote", "rollback"]
    name: str
    who: str
    when: str  # ISO 8601, UTC
    from_version: int | None
    to_version: int
    why: str
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        before = "none" if self.from_version is None else str(self.from_version)
        change = f"{self.action} {before} -> {self.to_version}"
        return f"{self.when}  {self.name}  {change}  by {self.who}: {self.why}"


@dataclass(frozen=True)
class Promotion:
    """What `promote` or `rollback` did; `entry` is None where the version was champion already."""

    name: str
    version: int
    previous: int | None
    entry: HistoryEntry | None

    @property
    def changed(self) -> bool:
        return self.entry is not None

    def message(self) -> str:
        """One line for people."""
        if self.entry is None:
            return f"{self.name} version {self.version} is champion already."
        before = "" if self.previous is None else f" instead of version {self.previous}"
        return f"{self.name} version {self.version} is champion{before}: {self.entry.why}"


def promote(
    paths: Paths, name: str, version: int | None = None, *, force_dirty: bool = False, why: str = ""
) -> Promotion:
    """Move the alias `champion` to a version, if it passes the policy's gates.

    Args:
        version: without one, the version with the alias `challenger`. Its tag `profile` names the policy's section.
        force_dirty: skip the gate `git`; the history says so.
        why: the reason for the history; without one, the gates that the version passed.

    Raises:
        PromotionRefused: gates failed; the message has each with the figure, its limit and the champion's figure.
        RegistryError, PolicyError: there is nothing to promote or no policy, or MLflow does not answer.
    """
    with _registry(paths) as client:
        current = version_with_alias(client, name, CHAMPION)
        number = version or version_with_alias(client, name, CHALLENGER)
        if number is None:
            raise RegistryError(f"{name} has no challenger. Register one with: vlv run register")
        if number == current:
            return Promotion(name, number, current, None)
        candidate = _candidate(client, name, number, current)
        policy = load_policy(paths, candidate.tags.get("profile", "default"))
        failures: list[str] = []
        passed: list[str] = []
        for gate in policy.gates:
            if gate == "git" and force_dirty:
                candidate.notes.append("gate git skipped by force")
                continue
            wrong = GATES[gate](policy, candidate)
            failures += [f"{gate}: {one}" for one in wrong]
            passed += [] if wrong else [gate]
        if failures:
            raise PromotionRefused(
                f"{name} version {number} is not promoted; champion stays {_shown(current)}.\n"
                + "\n".join(f"  {one}" for one in failures),
                tuple(failures),
            )
        reason = "; ".join([why or f"passed {', '.join(passed) or 'no gate'}", *candidate.notes])
        entry = _entry("promote", name, current, number, reason, dict(candidate.figures))
        _move(client, entry)
    return Promotion(name, number, current, entry)


def rollback(paths: Paths, name: str, why: str) -> Promotion:
    """Move the alias `champion` back to the previous champion. Each further rollback goes one champion further back.

    Raises:
        RegistryError: no earlier champion is left, or MLflow does not answer.
    """
    with _registry(paths) as client:
        current = version_with_alias(client, name, CHAMPION)
        alive = {int(one.version) for one in client.search_model_versions(f"name = '{name}'", max_results=1000)}
        earlier = [one for one in _champions(_history(client, name)) if one != current and one in alive]
        if not earlier:
            raise RegistryError(f"{name} has no earlier champion (present champion: {_shown(current)}).")
        entry = _entry("rollback", name, current, earlier[-1], why)
        _move(client, entry)
    return Promotion(name, earlier[-1], current, entry)


def history(paths: Paths, name: str) -> list[HistoryEntry]:
    """All promotions and rollbacks of a model, oldest first; none where there is no such model."""
    from mlflow.exceptions import MlflowException

    uri = tracking.prepare(paths)
    with explained(uri):
        try:
            return _history(store.client(uri), name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return []


@contextmanager
def _registry(paths: Paths) -> Iterator["MlflowClient"]:
    """A client, under a lock: one process on this machine changes the champion at a time."""
    uri = tracking.prepare(paths)
    lock = store.store_folder(paths) / ".promote.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock, timeout=1800), explained(uri):
        yield store.client(uri)


def _candidate(client: "MlflowClient", name: str, number: int, current: int | None) -> Candidate:
    import mlflow

    one = client.get_model_version(name, str(number))
    champion: ModelVersion | None = None if current is None else client.get_model_version(name, str(current))
    return Candidate(
        name=name,
        version=number,
        tags=dict(one.tags),
        figures=figures_of(one),
        fetch=lambda scratch: Path(
            mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{number}", dst_path=str(scratch))
        ),
        champion=current,
        champion_set=None if champion is None else champion.tags.get("evaluation_set", "unknown"),
        champion_figures=None if champion is None else figures_of(champion),
    )


def _entry(
    action: Literal["promote", "rollback"],
    name: str,
    before: int | None,
    after: int,
    why: str,
    figures: dict[str, float] | None = None,
) -> HistoryEntry:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    when = datetime.now(UTC).isoformat(timespec="microseconds")
    return HistoryEntry(action, name, f"{user}@{socket.gethostname()}", when, before, after, why, figures or {})


def _move(client: "MlflowClient", entry: HistoryEntry) -> None:
    """Set the alias and record the change. If the entry cannot be written, the alias is set back."""
    client.set_registered_model_alias(entry.name, CHAMPION, str(entry.to_version))
    key = f"{_HISTORY}{entry.when}.{uuid.uuid4().hex[:8]}".replace("+00:00", "Z")
    try:
        client.set_registered_model_tag(entry.name, key, json.dumps(asdict(entry)))
    except Exception:
        if entry.from_version is None:
            client.delete_registered_model_alias(entry.name, CHAMPION)
        else:
            client.set_registered_model_alias(entry.name, CHAMPION, str(entry.from_version))
        raise


def _history(client: "MlflowClient", name: str) -> list[HistoryEntry]:
    tags = client.get_registered_model(name).tags
    return [
        HistoryEntry(**files.parse_json(tags[key], f"the tag {key} of {name}"))
        for key in sorted(tags)
        if key.startswith(_HISTORY)
    ]


def _champions(entries: list[HistoryEntry]) -> list[int]:
    """The champions that rollbacks can go back to, the present one last. A rollback undoes promotions."""
    stack: list[int] = []
    for entry in entries:
        if entry.action == "rollback" and entry.to_version in stack:
            while stack[-1] != entry.to_version:
                stack.pop()
        else:
            stack.append(entry.to_version)
    return stack


def _shown(version: int | None) -> str:
    return "none" if version is None else f"version {version}"
