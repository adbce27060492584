"""The benchmarks run and say what they measured; how fast anything is, no test asks."""

from pathlib import Path

from tests import projects
from vlv import files


def test_every_pair_is_measured_in_turns(tmp_path: Path, sprites: Path) -> None:
    project = projects.smoke(tmp_path / "project", sprites)
    file = tmp_path / "steps.json"
    for command in (["vlv", "data", "download"], ["benchmarks.steps", "--rounds", "2", "--output", str(file)]):
        done = projects.run(projects.python("-m", *command), projects.REPOSITORY, VLV_ROOT=str(project), timeout=600)
        assert done.returncode == 0, done.stderr
    measured = files.read_json(file)
    assert measured["profile"] == "smoke"
    assert {pair["ours"].split(",")[0] for pair in measured["pairs"]} == {"Stage 1", "Stage 2"}
    for pair in measured["pairs"]:
        assert min(pair["seconds"], pair["control_seconds"], *pair["quartiles"]) > 0
        assert f"| {pair['ours']} | {pair['control']} |" in done.stdout
