"""kill -9 at random in the middle of both trainings: the same command then ends in the same bytes.

    python -m tests.kills                        # 20 kills of the smoke profile, seed 0: about 8 minutes on two cores
    python -m tests.kills --kills 3 --seed 7

A seed gives the same kills again: the stage, how many rows of the curve are waited for, and how long after them. Ends
with 1 if a training did not end in the bytes of an uninterrupted one.
"""

import argparse
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import projects
from vlv import config
from vlv.io import assets, files

STAGES = ("stage1", "stage2")
_LAST_ROW = 5  # of the 6 that a smoke training writes
_STEP_SECONDS = 0.15  # a kill falls anywhere in the step that follows, its checkpoint included


@dataclass(frozen=True)
class Kill:
    """When a training is killed: so many seconds after so many rows of its curve."""

    rows: int
    seconds: float


def draw(count: int, seed: int) -> list[Kill]:
    """The kills of one training, in the order in which it reaches them."""
    rng = random.Random(seed)
    rows = sorted(rng.sample(range(1, _LAST_ROW + 1), count))
    return [Kill(one, round(rng.uniform(0, _STEP_SECONDS), 3)) for one in rows]


def prepare(folder: Path) -> Path:
    """A smoke project after an uninterrupted Stage 1 and Stage 2."""
    source = config.parse(
        (projects.REPOSITORY / "configs" / "smoke.yaml").read_text(encoding="utf-8"), "smoke"
    ).data.source
    assert isinstance(source, config.ScenesSource)
    projects.prepare(projects.smoke(folder, assets.resolve(source.sprites, config.Paths(projects.REPOSITORY))))
    for stage in STAGES:
        _finish(folder, stage)
    return folder


def differs(uninterrupted: Path, folder: Path, stage: str, kills: list[Kill]) -> str | None:
    """Train `stage` again in `folder`, a copy of `uninterrupted`, with kills; returns what is wrong, or None.

    A kill that comes after the end of the process is wrong, too.
    """
    shutil.copytree(uninterrupted, folder, symlinks=True)
    shutil.rmtree(folder / "work" / stage)
    for kill in kills:
        if not projects.kill_after(folder, stage, kill.rows, kill.seconds):
            return f"it had ended before {kill}"
    _finish(folder, stage)
    ours, theirs = (
        files.sha256_file(one / "work" / stage / "model" / "model.safetensors") for one in (folder, uninterrupted)
    )
    if ours != theirs:
        return "its weights differ"
    left = list((folder / "work" / stage).glob("training-*"))
    return f"left behind: {left}" if left else None


def _finish(folder: Path, stage: str) -> None:
    done = projects.run(projects.python("-m", "vlv", "run", stage), folder)
    assert done.returncode == 0, done.stderr


def main() -> int:
    """Kill so many trainings once each; prints each outcome and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    held = 0
    with tempfile.TemporaryDirectory(prefix="vlv-kills-") as scratch:
        uninterrupted = prepare(Path(scratch) / "uninterrupted")
        for number in range(arguments.kills):
            stage = STAGES[number % len(STAGES)]
            kills = draw(1, seed=arguments.seed * 1000 + number)
            wrong = differs(uninterrupted, Path(scratch) / "trial", stage, kills)
            shutil.rmtree(Path(scratch) / "trial")
            held += wrong is None
            print(f"{number + 1:3} {stage} {kills}: {wrong or 'the same bytes'}", flush=True)
    print(f"kills: {arguments.kills} tried, {held} held (seed {arguments.seed})")
    return 0 if held == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
