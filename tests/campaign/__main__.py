"""The campaign against faults, for a maintainer before a release.

    python -m tests.campaign                         # everything, about an hour on two cores
    python -m tests.campaign --parts inputs damage   # hostile inputs, damaged files
    python -m tests.campaign --seed 7 --rounds 50    # other faults, more of them

It prints tried / held for each kind of fault, names each trial that did not hold, and exits with 1 if there is one.
The same seed draws the same faults (moments of signals excepted: the machine's speed decides what they hit).
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has used more threads cannot be forked safely

from tests import projects
from tests.campaign import damage, hostile, trials
from tests.campaign.trials import Tally
from vlv import config
from vlv.config import Paths, ScenesSource
from vlv.io import assets, telemetry

Part = Callable[[Path, Path, random.Random, int], Iterator[Tally]]


def _inputs(whole: Path, project: Path, draw: random.Random, rounds: int) -> Iterator[Tally]:
    shutil.copytree(whole, project, symlinks=True)
    yield from hostile.run(project, draw, rounds)


PARTS: dict[str, Part] = {
    "inputs": _inputs,
    "damage": damage.run,
    "training": damage.run_training,
    "signals": damage.run_signals,
}


def prepare(folder: Path) -> Path:
    """A smoke project in `folder`, after Stage 1 and Stage 2, and with the captions of a folder begun."""
    repository = Paths(projects.REPOSITORY)
    source = config.parse((repository.root / "configs" / "tiny.yaml").read_text(encoding="utf-8"), "tiny").data.source
    assert isinstance(source, ScenesSource)
    project = projects.smoke(folder / "whole", assets.resolve(source.sprites, repository))
    _pictures(project)
    for command in ("data download", "run validate", "run stage1", "run stage2"):
        done = projects.run(projects.python("-m", "vlv", *command.split()), project, VLV_ROOT=str(project))
        if done.returncode != 0:
            raise RuntimeError(f"vlv {command}: {done.stderr}")
    return project


def _pictures(project: Path) -> None:
    from PIL import Image

    (project / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 100, 150)).save(project / "pictures" / f"{number}.png")
    shutil.copy(project / "pictures" / "0.png", project / "picture.png")
    (project / "captions.json.partial").write_text('{"image": "0.png", "caption": "a"}\n', encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Faults of every kind, counted.")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20, help="random faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    telemetry.off()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="vlv-campaign-") as scratch:
        whole = prepare(Path(scratch))
        trials.warm()
        for name in chosen.parts:
            draw = random.Random(f"{chosen.seed} {name}")
            for tally in PARTS[name](whole, Path(scratch) / name, draw, chosen.rounds):
                tallies.append(tally)
                print(f"{tally.held:4} of {tally.tried:4} held   {tally.name}", flush=True)
                for failure in tally.failures:
                    print(f"               {failure}", flush=True)
    tried, held = sum(t.tried for t in tallies), sum(t.held for t in tallies)
    print(f"{held:4} of {tried:4} held   all, seed {chosen.seed}")
    return int(held < tried)


if __name__ == "__main__":
    sys.exit(main())
