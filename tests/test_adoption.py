"""An unfinished training of other code is continued only on request."""

import shutil
from pathlib import Path

import pytest

from tests import projects
from vlv.io import files

pytestmark = pytest.mark.training


def test_other_code_starts_again_unless_the_training_is_adopted(trained_smoke: Path, trained: Path) -> None:
    shutil.rmtree(trained / "work" / "stage1")
    assert projects.kill_after(trained, "stage1", 4)
    (old,) = (trained / "work" / "stage1").glob("training-*")
    loop = trained / "vlv" / "training" / "loop.py"
    loop.write_text(loop.read_text() + "\n\ndef unused() -> None: ...\n")  # not reached: the same training
    named = "        losses: list[float] = []\n"
    assert loop.read_text().count(named) == 1
    loop.write_text(loop.read_text().replace(named, f"{named}        harmless = 1  # noqa: F841\n"))

    refused = projects.run(projects.python("-m", "vlv", "run", "stage2", "--adopt"), trained)
    assert refused.returncode == 2 and "dvc repro stage1" in refused.stderr
    done = projects.run(projects.python("-m", "vlv", "run", "stage1", "--adopt"), trained)
    assert done.returncode == 0, done.stderr
    assert not old.exists() and "Continuing" in done.stdout
    (adopted,) = files.read_json(trained / "metrics" / "stage1.json")["adopted"]
    assert adopted["changed"] == ["vlv.training.loop"] and adopted["step"] in (4, 8)
    name = "work/stage1/model/model.safetensors"
    assert (trained / name).read_bytes() == (trained_smoke / name).read_bytes()
    assert not list((trained / "work" / "stage1").glob("training-*"))


def test_a_training_of_other_code_is_named_and_not_used(trained: Path) -> None:
    shutil.rmtree(trained / "work" / "stage1")
    assert projects.kill_after(trained, "stage1", 4)
    (old,) = (trained / "work" / "stage1").glob("training-*")
    loop = trained / "vlv" / "training" / "loop.py"
    named = "        losses: list[float] = []\n"
    loop.write_text(loop.read_text().replace(named, f"{named}        harmless = 1  # noqa: F841\n"))
    done = projects.run(projects.python("-m", "vlv", "run", "stage1"), trained)
    assert done.returncode == 0, done.stderr
    assert f"{old.name} stopped at step" in done.stderr and "vlv run stage1 --adopt" in done.stderr
    assert "resuming from step" not in done.stderr
    assert "adopted" not in files.read_json(trained / "metrics" / "stage1.json")
