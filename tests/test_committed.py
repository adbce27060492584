"""What is committed fits together. HEAD is read, not the work tree: whoever has just trained has other results."""

import json
import subprocess
from pathlib import Path

import yaml

from benchmarks import steps
from flows import report
from vlv import config
from vlv.config import Paths

ROOT = Path(__file__).resolve().parents[1]


def _committed(name: str) -> str:
    return subprocess.check_output(["git", "show", f"HEAD:{name}"], cwd=ROOT, text=True)


def test_the_parameters_are_a_profile_and_its_data_is_pinned() -> None:
    text = _committed("params.yaml")
    settings = config.parse(text, "params.yaml")
    assert text == _committed(f"configs/{settings.profile}.yaml")
    made_from = yaml.safe_load(_committed("data.dvc"))["meta"]["made_from"]
    assert made_from.items() >= settings.data.source.model_dump().items()


def test_the_lock_is_of_these_parameters() -> None:
    params = yaml.safe_load(_committed("params.yaml"))
    lock = yaml.safe_load(_committed("dvc.lock"))["stages"]
    for name, stage in lock.items():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            wanted = params
            for part in key.split("."):
                wanted = wanted[part]
            assert value == wanted, f"{name}: {key}"
    read = {dep["path"]: dep["md5"] for dep in lock["stage1"]["deps"]}
    assert read["data"] == yaml.safe_load(_committed("data.dvc"))["outs"][0]["md5"]


def test_readme_shows_the_figures_of_the_run(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.metrics.mkdir()
    (paths.metrics / "evaluate.json").write_text(_committed("metrics/evaluate.json"))
    for table in report.figures(paths):
        assert table.markdown() in _committed("README.md")
    assert json.loads(_committed("metrics/evaluate.json"))["profile"] == "tiny"


def test_readme_shows_the_controls_figures() -> None:
    command = ["git", "ls-tree", "--name-only", "HEAD", "metrics/variants/"]
    folders = subprocess.check_output(command, cwd=ROOT, text=True).split()
    assert folders, "no control is committed"
    for folder in ["metrics", *folders]:
        measured = json.loads(_committed(f"{folder}/evaluate.json"))
        captions, drawn = measured["scenes"], measured["reconstruction"]
        figures = [captions["object_recall"], captions["exact_match"], drawn["object_recall"]]
        row = " | ".join([*(f"{figure:.3f}" for figure in figures), f"{drawn['psnr']:.2f}"])
        assert f"| {row} |" in _committed("README.md"), folder


def test_the_benchmarks_page_shows_what_was_measured() -> None:
    measured = json.loads(_committed("benchmarks/steps.json"))["pairs"]
    assert steps.table(measured) in _committed("benchmarks/README.md")
