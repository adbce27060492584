"""The benchmarks run and report what they measured; no test checks speed."""

from pathlib import Path

import pytest

from tests import projects
from vlv.io import files


@pytest.mark.training
def test_every_pair_is_measured_alternately(tmp_path: Path, ready_smoke: Path) -> None:
    file = tmp_path / "steps.json"
    command = ["-m", "benchmarks.steps", "--rounds", "2", "--output", str(file)]
    done = projects.run(projects.python(*command), projects.REPOSITORY, VLV_ROOT=str(ready_smoke), timeout=600)
    assert done.returncode == 0, done.stderr
    measured = files.read_json(file)
    assert measured["profile"] == "smoke"
    assert {pair["ours"].split(",")[0] for pair in measured["pairs"]} == {"Stage 1", "Stage 2"}
    for pair in measured["pairs"]:
        assert min(pair["seconds"], pair["control_seconds"], *pair["quartiles"]) > 0
        assert f"| {pair['ours']} | {pair['control']} |" in done.stdout
