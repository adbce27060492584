"""kill -9 in the middle of both stages: the same command then ends in the same bytes."""

import random
import shutil
from pathlib import Path

import pytest

from tests import projects
from vlv import files

KILLS = 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, sprites: Path) -> Path:
    """A smoke project after Stage 1 and Stage 2, nothing having gone wrong."""
    project = projects.smoke(tmp_path_factory.mktemp("resume") / "project", sprites)
    for command in (("data", "download"), ("run", "stage1"), ("run", "stage2")):
        done = projects.run(projects.python("-m", "vlv", *command), project)
        assert done.returncode == 0, done.stderr
    return project


def _weights(project: Path, stage: str) -> str:
    return files.sha256_file(project / "work" / stage / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(uninterrupted: Path, tmp_path: Path, stage: str) -> None:
    project = tmp_path / "project"
    shutil.copytree(uninterrupted, project, symlinks=True)
    shutil.rmtree(project / "work" / stage)
    # Where it is killed differs from run to run, as in life; the curve grows, so each kill is further on.
    kills = sorted(random.sample(range(1, 6), KILLS))
    killed = [projects.kill_after(project, stage, lines) for lines in kills]
    assert all(killed), f"of the kills after {kills} lines of the curve only {killed} came in time"
    assert not (project / "work" / stage / "model").exists(), "it had finished before the last kill"
    done = projects.run(projects.python("-m", "vlv", "run", stage), project)
    assert done.returncode == 0, done.stderr
    assert _weights(project, stage) == _weights(uninterrupted, stage), f"killed after {kills} lines of the curve"
    assert not list((project / "work" / stage).glob("training-*")), "checkpoints left behind"
