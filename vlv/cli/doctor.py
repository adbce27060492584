"""`vlv doctor`: finds what could keep a run from starting, finishing or being reproduced, and the remedies."""

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from vlv import config, tracking
from vlv.config import ConfigError, Paths
from vlv.io import files, pin

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", flags=re.MULTILINE)
_GIB = 1 << 30
_DISK_NEEDED, _DISK_WISHED = 2 * _GIB, 10 * _GIB
_MEMORY_WISHED = 4 * _GIB


@dataclass(frozen=True)
class Finding:
    """The result of one check. `problem`: a run would fail or could not be reproduced; `note`: worth knowing."""

    level: Literal["ok", "note", "problem"]
    what: str
    found: str
    remedy: str = ""


def examine(paths: Paths) -> list[Finding]:
    """Run all checks; a check that itself fails is a problem, with its error as the finding."""
    findings: list[Finding] = []
    for check in (_python, _packages, _torch, _room, _tools, _configuration, _data, _locks, _outbox, _env):
        findings += _guarded(check, paths)
    return findings


def _guarded(check: Callable[[Paths], Iterator[Finding]], paths: Paths) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(paths))
    except Exception as error:  # one failing check must not hide the others
        found.append(Finding("problem", check.__name__.strip("_"), f"{type(error).__name__}: {error}"))
    return found


def _python(_paths: Paths) -> Iterator[Finding]:
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    remedy = "" if fits else "use Python 3.11 or 3.12: make clean, then make full-train PYTHON=python3.11"
    yield Finding("ok" if fits else "problem", "Python", f"{platform.python_version()} at {sys.executable}", remedy)


def _packages(paths: Paths) -> Iterator[Finding]:
    lock = paths.root / "requirements.lock"
    if not lock.exists():
        yield Finding("note", "packages", "no requirements.lock here to compare with")
        return
    pins = _PIN.findall(files.read_text(lock))
    # The package itself pins torch, whose builds come from more than one index.
    pins += [pin for line in metadata.requires("vlv") or [] for pin in _PIN.findall(line)]
    wrong = []
    for name, wanted in pins:
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} {found} (lock: {wanted})")
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        yield Finding("problem", "packages", shown, "make env")
    else:
        yield Finding("ok", "packages", f"{len(pins)} as in requirements.lock")


def _torch(_paths: Paths) -> Iterator[Finding]:
    import torch

    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    yield Finding("ok", "torch", f"{torch.__version__} on {where}")


def _room(paths: Paths) -> Iterator[Finding]:
    free = shutil.disk_usage(paths.root).free
    level: Literal["ok", "note", "problem"] = "ok"
    if free < _DISK_WISHED:
        level = "note" if free >= _DISK_NEEDED else "problem"
    remedy = "" if level == "ok" else "dvc gc --workspace removes old versions from DVC's cache"
    yield Finding(level, "disk", f"{free / _GIB:.1f} GiB free", remedy)
    memory = psutil.virtual_memory().available
    enough = memory >= _MEMORY_WISHED
    remedy = "" if enough else "the tiny profile needs about 4 GiB; close something"
    yield Finding("ok" if enough else "note", "memory", f"{memory / _GIB:.1f} GiB available", remedy)


def _tools(paths: Paths) -> Iterator[Finding]:
    git = shutil.which("git")
    yield Finding("ok", "git", git) if git else Finding("problem", "git", "not found", "install git")
    if importlib.util.find_spec("dvc") is None:
        yield Finding("problem", "dvc", "not installed", "make env")
    elif not (paths.root / ".dvc").is_dir():
        yield Finding("problem", "dvc", f"{paths.root} is no DVC project", "dvc init")
    else:
        yield Finding("ok", "dvc", metadata.version("dvc"))
    if git and not (paths.root / ".git").exists():
        yield Finding("note", "repository", "not a git clone: versions will carry no commit", "git clone")


def _configuration(paths: Paths) -> Iterator[Finding]:
    try:
        chosen = config.load(paths)
    except ConfigError as error:
        yield Finding("problem", "params.yaml", str(error), "vlv config use tiny")
        return
    yield Finding("ok", "params.yaml", f"profile {chosen.profile}")
    profile = paths.root / "configs" / f"{chosen.profile}.yaml"
    if profile.exists() and profile.read_bytes() != paths.params.read_bytes():
        yield Finding("note", "params.yaml", f"differs from configs/{profile.name}", "intended? dvc params diff")
    parts = (chosen.encoder, chosen.decoder, chosen.language_model)
    for reference in {part.architecture or part.pretrained for part in parts}:
        if ":" not in reference and not (paths.root / reference).exists():
            yield Finding("problem", "pretrained part", f"{reference} is missing", "git checkout pretrained")


def _data(paths: Paths) -> Iterator[Finding]:
    from vlv.data import shards

    pointer = paths.root / pin.POINTER
    if not paths.data.exists():
        yield Finding("note", "data", "not there yet", "vlv data download")
        return
    try:
        shards.verify(paths.data, pointer if pointer.exists() else None)
    except shards.DataError as error:
        yield Finding("problem", "data", str(error), "vlv data download")
        return
    against = "as pinned in data.dvc" if pointer.exists() else "intact, pinned nowhere"
    yield Finding("ok" if pointer.exists() else "note", "data", against, "" if pointer.exists() else "dvc add data")


def _locks(paths: Paths) -> Iterator[Finding]:
    holders = [*paths.work.glob(".lock.holder"), *paths.work.glob("*/.lock.holder")]
    for holder in holders:
        who = files.read_text(holder).strip()
        number = re.search(r"\d+", who)
        alive = bool(number and psutil.pid_exists(int(number.group())))
        remedy = "kill -TERM lets it save first" if alive else "left by a kill; harmless"
        yield Finding("note", f"lock on {holder.parent.relative_to(paths.root).as_posix()}", who, remedy)
    if not holders:
        yield Finding("ok", "locks", "no run in this folder")


def _outbox(paths: Paths) -> Iterator[Finding]:
    where = tracking.tracking_uri(paths)
    if not tracking.undelivered(paths):
        yield Finding("ok", "MLflow", f"{tracking.without_password(where)}, nothing undelivered")
        return
    replayed = tracking.replay_all(paths)
    if replayed.waiting:
        remedy = "is the server up? then: vlv doctor"
        yield Finding("note", "MLflow outbox", f"{len(replayed.waiting)} runs wait: {replayed.reason}", remedy)
    else:
        yield Finding(
            "ok", "MLflow outbox", f"{replayed.delivered} runs delivered now to {tracking.without_password(where)}"
        )


def _env(_paths: Paths) -> Iterator[Finding]:
    names = (
        "VLV_ROOT",
        "VLV_CACHE",
        "MLFLOW_TRACKING_URI",
        "PREFECT_API_URL",
        "PREFECT_HOME",
        "CUDA_VISIBLE_DEVICES",
    )
    for name in names:
        if value := os.environ.get(name):
            yield Finding("note", name, tracking.without_password(value), "set in your environment")
    for name in ("VLV_ROOT", "VLV_CACHE"):
        if (value := os.environ.get(name)) and not Path(value).exists():
            yield Finding("problem", name, f"{value} does not exist", f"unset {name}")
