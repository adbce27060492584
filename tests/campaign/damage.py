"""Mutations of every file that the project writes, each before a command that reads it."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import projects
from tests.campaign import mutations, trials
from tests.campaign.trials import Tally
from vlv.io import files

# Files, and the command that reads them.
_STAGE2 = ["--model", "work/stage2/model"]
_READERS: list[tuple[str, list[str], list[str]]] = [
    ("configuration", ["params.yaml"], ["config", "show"]),
    ("profile", ["configs/smoke.yaml"], ["config", "use", "smoke"]),
    ("data", ["data/manifest.json", "data/*/*.tar", "data/*/samples.parquet", "data.dvc"], ["data", "verify"]),
    ("validation", ["data/manifest.json", "data/*/*.tar", "data/*/samples.parquet"], ["run", "validate"]),
    ("Stage 1's model", ["work/stage1/model/*"], ["reconstruct", "picture.png", "-o", "drawn", "--steps", "1"]),
    ("a captioner", ["work/stage2/model/*"], ["caption", "picture.png", "-o", "c.json", *_STAGE2]),
    ("captions so far", ["captions.json.partial"], ["caption", "pictures", "-o", "captions.json", *_STAGE2]),
    ("store", ["mlflow/store/mlflow.db"], ["models"]),
]  # fmt: skip
_TRAINING = [f"work/stage1/training-*/{name}" for name in ("run-*/record.jsonl", "ledger.json", "checkpoints/*/*")]
_RECORD = ["work/stage1/training-*/run-*/record.jsonl"]
_CACHES = [".cache/features-*/*/*", ".cache/latents-*/*/*"]


def run(whole: Path, project: Path, draw: random.Random, rounds: int) -> Iterator[Tally]:
    """`rounds` mutations of the files of each row, in `project`, a copy of `whole`."""
    for name, patterns, command in _READERS:
        tally = Tally(f"damaged files: {name}")
        for path, mutation in _drawn(whole, patterns, draw, rounds):
            _copy(whole, project)
            mutations.mutate(project / path, mutation, draw)
            tally.judge(f"{path}: {mutation}", trials.vlv(command, project))
        yield tally


def run_training(whole: Path, project: Path, draw: random.Random, rounds: int) -> Iterator[Tally]:
    """The same for the files of an unfinished Stage 1: if it continues, it ends with the weights of `whole`."""
    wanted = files.sha256_file(whole / "work" / "stage1" / "model" / "model.safetensors")
    unfinished = stopped(whole, project)
    for name, patterns, command in (
        ("an unfinished training", _TRAINING, ["run", "stage1"]),
        ("caches", _CACHES, ["run", "stage1"]),
        ("record of a run", _RECORD, ["doctor"]),
    ):
        tally = Tally(f"damaged files: {name}")
        for path, mutation in _drawn(unfinished, patterns, draw, rounds):
            _copy(unfinished, project)
            mutations.mutate(project / path, mutation, draw)
            outcome = trials.vlv(command, project)
            trained = command[0] == "run" and outcome.code == 0
            tally.judge(f"{path}: {mutation}", outcome, _other_weights(project, wanted) if trained else None)
        yield tally


def run_signals(whole: Path, project: Path, draw: random.Random, rounds: int) -> Iterator[Tally]:
    """kill -9 and SIGTERM at random moments of `vlv run` and `dvc repro`: nothing is left, the result is the same."""
    wanted = files.sha256_file(whole / "work" / "stage1" / "model" / "model.safetensors")
    for name, command, number in (
        ("kill -9 of vlv run", ["vlv", "run", "stage1"], signal.SIGKILL),
        ("SIGTERM to vlv run", ["vlv", "run", "stage1"], signal.SIGTERM),
        ("kill -9 of dvc repro", ["dvc", "repro", "--single-item", "--force", "stage1"], signal.SIGKILL),
        ("SIGTERM to the group of dvc repro", ["dvc", "repro", "--single-item", "--force", "stage1"], signal.SIGTERM),
    ):
        tally = Tally(name)
        for _ in range(rounds):
            _copy(whole, project)
            shutil.rmtree(project / "work" / "stage1")
            after = draw.uniform(0.5, 12.0)
            problem = _interrupt(command, number, after, project)
            outcome = trials.vlv(["run", "stage1"], project)
            tally.judge(f"after {after:.1f} s", outcome, problem or _other_weights(project, wanted))
        yield tally


def _interrupt(command: Sequence[str], number: signal.Signals, after: float, project: Path) -> str | None:
    """Start it and send the signal; returns what is wrong with how it ended."""
    env = projects.environment(VLV_ROOT=str(project))
    process = subprocess.Popen(
        projects.python("-m", *command), cwd=project, env=env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process.wait(after)
        return None  # it was faster
    except subprocess.TimeoutExpired:
        pass
    group = number == signal.SIGTERM and command[0] == "dvc"
    (projects.signal_group if group else lambda p, n: p.send_signal(n))(process, number)
    process.wait(60)
    deadline = time.monotonic() + 60
    while (left := projects.group_members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        projects.signal_group(process, signal.SIGKILL)
        return f"{len(left)} processes are left"
    if command[0] == "vlv" and number == signal.SIGTERM and process.returncode not in (0, 143, -signal.SIGTERM):
        return f"it ended with {process.returncode} instead of 143"
    return None


def stopped(whole: Path, project: Path) -> Path:
    """A copy of `whole` whose Stage 1 was killed when half of it was done."""
    unfinished = whole.with_name("unfinished")
    if not unfinished.exists():
        _copy(whole, unfinished)
        shutil.rmtree(unfinished / "work" / "stage1")
        if not projects.kill_after(unfinished, "stage1", 3):
            raise RuntimeError("Stage 1 was finished before it could be killed")
    return unfinished


def _other_weights(project: Path, wanted: str) -> str | None:
    path = project / "work" / "stage1" / "model" / "model.safetensors"
    if not path.exists():
        return "there is no model"
    return None if files.sha256_file(path) == wanted else "it ended with other weights"


def _drawn(whole: Path, patterns: list[str], draw: random.Random, rounds: int) -> Iterator[tuple[Path, str]]:
    found = [sorted(p.relative_to(whole) for p in whole.glob(pattern) if p.is_file()) for pattern in patterns]
    found = [paths for paths in found if paths]
    for number in range(rounds if found else 0):
        yield draw.choice(found[number % len(found)]), draw.choice(sorted(mutations.MUTATIONS))


def _copy(whole: Path, project: Path) -> None:
    if project.exists():
        mutations.restore(project, whole)
    else:
        shutil.copytree(whole, project, symlinks=True)
