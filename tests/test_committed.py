"""The committed files agree with each other; they are never compared with this repository's history.

In a git repository HEAD is read, because the work tree may hold the results of a new training; an archive without git
holds the committed files. In a fork that trained something else, rules for the shipped run are skipped by name.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import steps
from flows import artifacts
from vlv import config
from vlv.config import Paths

ROOT = Path(__file__).resolve().parents[1]
README_PROFILE = "tiny"  # the profile of the run in README


class Committed:
    """Reads the committed files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_git = (folder / ".git").exists() and self._git("rev-parse", "--verify", "HEAD") is not None

    def _git(self, *arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout if done.returncode == 0 else None

    def find(self, name: str) -> str | None:
        """A file's text; None if it is not committed."""
        if self.has_git:
            return self._git("show", f"HEAD:{name}")
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def text(self, name: str) -> str:
        """A file's text; the test is skipped if it is not committed."""
        found = self.find(name)
        if found is None:
            pytest.skip(f"{name} is not committed here: nothing to compare")
        return found

    def yaml(self, name: str) -> Any:
        return yaml.safe_load(self.text(name))

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))

    def figures(self, scratch: Path) -> list[str]:
        """The tables of the committed evaluation, in markdown."""
        paths = Paths(scratch)
        paths.metrics.mkdir(exist_ok=True)
        (paths.metrics / "evaluate.json").write_text(self.text("metrics/evaluate.json"), encoding="utf-8")
        return [table.markdown() for table in artifacts.figures(paths)]


def parameters_are_a_profiles(committed: Committed, scratch: Path) -> None:
    text = committed.text("params.yaml")
    name = config.parse(text, "params.yaml").profile
    if text == committed.find(f"configs/{name}.yaml"):
        return
    readme = committed.text("README.md")
    shown = all(table in readme for table in committed.figures(scratch))
    assert not shown, f"README shows this run, but params.yaml is not configs/{name}.yaml: `vlv config use {name}`"
    pytest.skip(f"params.yaml holds other values than configs/{name}.yaml: a run of its own")


def data_is_pinned_for_these_parameters(committed: Committed, scratch: Path) -> None:
    source = config.parse(committed.text("params.yaml"), "params.yaml").data.source
    made_from = (committed.yaml("data.dvc").get("meta") or {}).get("made_from")
    if made_from is None:
        pytest.skip("data.dvc does not say what the data was made from")
    described = {"kind": "imported"} if source.kind == "imported" else source.model_dump()
    assert made_from.items() >= described.items(), "data.dvc pins other data: `vlv data download`"


def lock_is_of_these_parameters(committed: Committed, scratch: Path) -> None:
    params, lock = committed.yaml("params.yaml"), committed.yaml("dvc.lock")["stages"]
    for name, stage in lock.items():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            wanted = params
            for part in key.split("."):
                wanted = wanted.get(part) if isinstance(wanted, dict) else None
            assert value == wanted, f"dvc.lock, {name}: {key} is not params.yaml's; `dvc repro`"
    read = {name: dep["md5"] for name, stage in lock.items() for dep in stage.get("deps", ()) if dep["path"] == "data"}
    if not read:
        pytest.skip("no stage of dvc.lock has read the data")
    assert set(read.values()) == {committed.yaml("data.dvc")["outs"][0]["md5"]}, read


def readme_shows_the_runs_figures(committed: Committed, scratch: Path) -> None:
    readme, tables = committed.text("README.md"), committed.figures(scratch)
    missing = [table for table in tables if table not in readme]
    if missing and committed.text("params.yaml") != committed.find(f"configs/{README_PROFILE}.yaml"):
        pytest.skip(f"README shows a run of configs/{README_PROFILE}.yaml, which params.yaml here is not")
    assert not missing, f"README shows other figures than metrics/evaluate.json; they are\n\n{missing[0]}"
    if tables:
        assert committed.json("metrics/evaluate.json")["profile"] == README_PROFILE


def results_page_shows_the_variants_figures(committed: Committed, scratch: Path) -> None:
    """Check each row of docs/results.md that names its `make variant NAME=...`."""
    rows = {
        found[1]: line
        for line in committed.text("docs/results.md").splitlines()
        if (found := re.search(r"NAME=([\w-]+)", line))
    }
    measured = {name: committed.find(f"metrics/variants/{name}/evaluate.json") for name in rows}
    if not any(measured.values()):
        pytest.skip("no variant that docs/results.md shows is committed here")
    for name, text in measured.items():
        assert text is not None, (
            f"docs/results.md shows {name}, but metrics/variants/{name}/evaluate.json is not committed"
        )
        captions, drawn = json.loads(text)["scenes"], json.loads(text)["reconstruction"]
        figures = [captions["object_recall"], captions["exact_match"], drawn["object_recall"]]
        wanted = " | ".join([*(f"{figure:.3f}" for figure in figures), f"{drawn['psnr']:.2f}"])
        assert f"| {wanted} |" in rows[name], f"docs/results.md, row of {name}: its figures are {wanted}"


def benchmarks_page_shows_what_was_measured(committed: Committed, scratch: Path) -> None:
    table = steps.table(committed.json("benchmarks/steps.json")["pairs"])
    assert table in committed.text("benchmarks/README.md"), "benchmarks/README.md: its table is not steps.json's"


Rule = Callable[[Committed, Path], None]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        parameters_are_a_profiles,
        data_is_pinned_for_these_parameters,
        lock_is_of_these_parameters,
        readme_shows_the_runs_figures,
        results_page_shows_the_variants_figures,
        benchmarks_page_shows_what_was_measured,
    )
}
FILES = ("README.md", "docs/results.md", "params.yaml", "data.dvc", "dvc.lock", "metrics", "configs", "benchmarks")


@pytest.mark.parametrize("name", RULES)
def test_committed_files_agree(name: str, tmp_path: Path) -> None:
    RULES[name](Committed(ROOT), tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The committed files in a folder without git."""
    here, folder = Committed(ROOT), tmp_path / "archive"
    for path in (path for name in FILES for path in (sorted((ROOT / name).rglob("*")) or [ROOT / name])):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in {".md", ".yaml", ".dvc", ".lock", ".json"} and (text := here.find(name)) is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def _outcomes(folder: Path, scratch: Path) -> dict[str, str]:
    """The outcome of each rule for a folder: passed, skipped or failed."""
    said = {}
    for name, rule in RULES.items():
        try:
            rule(Committed(folder), scratch)
            said[name] = "passed"
        except pytest.skip.Exception:
            said[name] = "skipped"
        except AssertionError:
            said[name] = "failed"
    return said


def test_an_archive_without_git_gives_the_same_outcomes(archive: Path, tmp_path: Path) -> None:
    assert not Committed(archive).has_git
    assert _outcomes(archive, tmp_path) == _outcomes(ROOT, tmp_path)


def _train_something_else(fork: Path, changes: Callable[[Any], None]) -> None:
    """Write what `dvc repro` with changed values writes: other parameters, another lock, other figures."""
    params = yaml.safe_load((fork / "params.yaml").read_text(encoding="utf-8"))
    changes(params)
    (fork / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    lock = yaml.safe_load((fork / "dvc.lock").read_text(encoding="utf-8"))
    for stage in lock["stages"].values():
        for key in stage.get("params", {}).get("params.yaml", {}):
            value = params
            for part in key.split("."):
                value = value[part]
            stage["params"]["params.yaml"][key] = value
    (fork / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")
    evaluation = json.loads((fork / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    evaluation["scenes"]["exact_match"] = 0.123
    (fork / "metrics" / "evaluate.json").write_text(json.dumps(evaluation), encoding="utf-8")


def test_a_fork_with_another_training_is_checked_against_itself(archive: Path, tmp_path: Path) -> None:
    _train_something_else(archive, lambda params: params["stage1"].update(steps=77))
    outcomes = _outcomes(archive, tmp_path)
    assert "failed" not in outcomes.values()
    assert outcomes["lock_is_of_these_parameters"] == "passed"
    assert outcomes["parameters_are_a_profiles"] == outcomes["readme_shows_the_runs_figures"] == "skipped"
    # its own mistakes are still found: parameters changed after the run
    params = (archive / "params.yaml").read_text(encoding="utf-8")
    (archive / "params.yaml").write_text(params.replace("steps: 77", "steps: 78"), encoding="utf-8")
    assert _outcomes(archive, tmp_path)["lock_is_of_these_parameters"] == "failed"


def test_mistakes_of_the_shipped_run_are_found(archive: Path, tmp_path: Path) -> None:
    """Other figures with the same parameters, and other parameters with the same figures."""
    if _outcomes(archive, tmp_path)["readme_shows_the_runs_figures"] == "skipped":
        pytest.skip("a fork: the shipped run's mistakes cannot be made in it")
    params = (archive / "params.yaml").read_text(encoding="utf-8")
    (archive / "params.yaml").write_text(params + "\n", encoding="utf-8")
    assert _outcomes(archive, tmp_path)["parameters_are_a_profiles"] == "failed"
    (archive / "params.yaml").write_text(params, encoding="utf-8")
    _train_something_else(archive, lambda params: None)
    (archive / "params.yaml").write_text(params, encoding="utf-8")
    assert _outcomes(archive, tmp_path)["readme_shows_the_runs_figures"] == "failed"


def test_a_folder_without_results_has_nothing_to_compare(archive: Path, tmp_path: Path) -> None:
    for name in ("dvc.lock", "data.dvc", "metrics/evaluate.json", "benchmarks/steps.json"):
        (archive / name).unlink()
    for path in (archive / "metrics" / "variants").rglob("*.json"):
        path.unlink()
    outcomes = _outcomes(archive, tmp_path)
    assert outcomes.pop("parameters_are_a_profiles") in ("passed", "skipped")
    assert set(outcomes.values()) == {"skipped"}
