"""The registry against a real MLflow on sqlite, with a trivially small model."""

import base64
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlv import config, registry, tracking
from vlv.config import Paths

ROOT = Path(__file__).resolve().parents[1]

POLICY = """
quick: &quick
  gates: [thresholds, champion, data, git]
  thresholds:
    scenes.exact_match: {min: 0.9}
    reconstruction.object_recall: {min: 0.92, relative_to: reconstruction.upper_bound.object_recall}
  champion:
    other_evaluation_set: refuse
    figures:
      scenes.exact_match: {tolerance: 0.01}
      reconstruction.fid: {tolerance: 1.0}
served:
  gates: [serving]
default:
  <<: *quick
  champion:
    other_evaluation_set: allow
    figures: {}
"""

# Answers with the word in the model folder, as the package stored with the version spells it.
SCRIPT = """
from pathlib import Path
import mlflow, pandas as pd
from mlflow.pyfunc.model import PythonModel

class Word(PythonModel):
    def load_context(self, context):
        self.word = (Path(context.artifacts["model"]) / "word.txt").read_text()
    def predict(self, context, model_input, params=None):
        import toy_spelling
        return pd.DataFrame({"caption": [toy_spelling.spell(self.word) for _ in model_input["image"]]})

mlflow.models.set_model(Word())
"""

GOOD = {"git_dirty": "false", "data_validation": "passed", "evaluation_set": "set1", "profile": "quick"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project with a policy and a sqlite file of its own; each test uses a model name of its own."""
    paths = Paths(tmp_path_factory.mktemp("project"))
    (paths.root / "mlflow").mkdir()
    (paths.root / "mlflow" / "policy.yaml").write_text(POLICY)
    return paths


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "VLV_PARENT_RUN_ID", "VLV_FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "toy_spelling"
    folder.mkdir()
    (folder / "__init__.py").write_text("def spell(word: str) -> str:\n    return word.upper()\n")
    return folder


Register = Callable[..., int]


@pytest.fixture
def register(project: Paths, package: Path, tmp_path: Path) -> Register:
    """register(name, exact=..., fid=..., **tags) -> version."""
    with tracking.start_run(project, "register", system_metrics=False) as run:
        run_id = run.wait_for_id()
    (tmp_path / "script.py").write_text(SCRIPT)
    served = dataclasses.replace(registry.CAPTIONER, script=tmp_path / "script.py")

    def make(name: str, exact: float = 0.95, fid: float = 20.0, **tags: str) -> int:
        model = tmp_path / "weights"
        model.mkdir(exist_ok=True)
        (model / "word.txt").write_text("cat")
        figures: dict[str, Any] = {"scenes": {"n": 600, "exact_match": exact, "examples": ["a"]}}
        figures["reconstruction"] = {"object_recall": 0.9, "fid": fid, "upper_bound": {"object_recall": 0.96}}
        (tmp_path / "evaluate.json").write_text(json.dumps(figures))
        return registry.register(
            project,
            name,
            served,
            model_folder=model,
            example={"image": [base64.b64encode(b"picture").decode()] * 2},
            evaluation=tmp_path / "evaluate.json",
            tags={**GOOD, **tags},
            run_id=run_id,
            code=package,
        )

    return make


def champion(paths: Paths, name: str) -> int | None:
    rows = [row for row in registry.list_models(paths) if row.name == name]
    return next((row.version for row in rows if "champion" in row.aliases), None)


def test_promotions_and_rollbacks_are_remembered(project: Paths, register: Register) -> None:
    name = "remembered"
    assert registry.history(project, name) == []
    with pytest.raises(registry.RegistryError, match="vlv run register"):
        registry.promote(project, name)
    assert register(name, exact=0.95) == 1
    assert champion(project, name) is None  # registered is not promoted
    first = registry.promote(project, name)
    assert (first.version, first.previous, first.changed) == (1, None, True)
    assert not registry.promote(project, name).changed
    register(name, exact=0.945)  # worse, within the tolerance
    register(name, exact=0.97)
    registry.promote(project, name, 2)
    assert registry.promote(project, name).previous == 2
    assert champion(project, name) == 3

    assert registry.rollback(project, name, "bad on photographs").version == 2
    assert registry.rollback(project, name, "worse still").version == 1
    with pytest.raises(registry.RegistryError, match="no earlier champion"):
        registry.rollback(project, name, "once more")
    assert champion(project, name) == 1

    entries = registry.history(project, name)
    changes = [(one.action, one.from_version, one.to_version) for one in entries]
    assert changes == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 1),
    ]
    assert entries[3].why == "bad on photographs"
    assert entries[2].figures["scenes.exact_match"] == 0.97
    assert all("@" in one.who and one.when.endswith("+00:00") for one in entries)


def test_a_worse_model_is_refused_with_all_reasons(project: Paths, register: Register) -> None:
    name = "worse"
    register(name, exact=0.95, fid=20.0)
    registry.promote(project, name)
    register(name, exact=0.85, fid=30.0, git_dirty="true", data_validation="failed")
    with pytest.raises(registry.PromotionRefused) as refused:
        registry.promote(project, name)
    assert champion(project, name) == 1
    assert len(registry.history(project, name)) == 1
    told = dict.fromkeys(("thresholds", "champion", "data", "git"), "")
    for failure in refused.value.failures:
        gate, _, text = failure.partition(": ")
        told[gate] += text
    assert "scenes.exact_match is 0.85, but must be at least 0.9; the champion has 0.95" in told["thresholds"]
    assert "scenes.exact_match is 0.85, but must be at least 0.94;" in told["champion"]
    assert "reconstruction.fid is 30, but must be at most 21; the champion has 20" in told["champion"]
    assert "data_validation is 'failed'" in told["data"]
    assert "git_dirty is 'true'" in told["git"]
    assert all(one in str(refused.value) for one in refused.value.failures)


def test_uncommitted_code_can_be_forced_and_the_history_says_so(project: Paths, register: Register) -> None:
    register("forced", git_dirty="unknown")
    with pytest.raises(registry.PromotionRefused, match="git_dirty"):
        registry.promote(project, "forced")
    registry.promote(project, "forced", force_dirty=True)
    (entry,) = registry.history(project, "forced")
    assert "gate git skipped by force" in entry.why


def test_another_evaluation_set_is_not_compared(project: Paths, register: Register) -> None:
    register("sets")
    registry.promote(project, "sets")
    register("sets", evaluation_set="set2")
    with pytest.raises(registry.PromotionRefused, match=r"set set1, this version on set2"):
        registry.promote(project, "sets")
    register("sets", evaluation_set="set2", profile="without a section")
    done = registry.promote(project, "sets")
    assert done.version == 3
    assert "not compared" in done.message()


@pytest.mark.slow
def test_the_registered_version_predicts_with_its_own_code(project: Paths, register: Register, package: Path) -> None:
    register("served", profile="served")
    (package / "__init__.py").unlink()  # what happens here later does not change the version
    registry.promote(project, "served")
    folder = registry.fetch(project, "models:/served@champion")
    assert (folder / "word.txt").read_text() == "cat"
    assert folder.is_relative_to(project.root)  # and not in ./mlruns
    with pytest.raises(registry.RegistryError, match="vlv models"):
        registry.fetch(project, "models:/served@nobody")


@pytest.mark.slow
def test_a_version_that_does_not_predict_is_refused(project: Paths, register: Register, package: Path) -> None:
    (package / "__init__.py").write_text("def spell(word):\n    raise ValueError('cannot spell')\n")
    register("broken", profile="served")
    with pytest.raises(registry.PromotionRefused, match=r"serving: .*cannot spell"):
        registry.promote(project, "broken")
    assert champion(project, "broken") is None


def test_lineage_counts_code_and_configuration_only(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert registry.lineage(paths)["git_commit"] == "unknown"
    (tmp_path / "params.yaml").write_text("profile: tiny\n")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0123.dir\n  path: data\n")
    (tmp_path / "dvc.lock").write_text("")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert registry.lineage(paths)["git_dirty"] == "unknown"  # no commit yet
    git("add", ".")
    git("commit", "-m", "all")
    paths.metrics.mkdir()
    (paths.metrics / "validate.json").write_text('{"success": true}')
    (paths.metrics / "evaluate.json").write_text('{"evaluation_set": "abc"}')
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    found = registry.lineage(paths)
    assert len(found["git_commit"]) == 40
    assert {key: found[key] for key in ("git_dirty", "data_md5", "profile", "data_validation", "evaluation_set")} == {
        "git_dirty": "false",
        "data_md5": "0123.dir",
        "profile": "tiny",
        "data_validation": "passed",
        "evaluation_set": "abc",
    }
    (tmp_path / "params.yaml").write_text("profile: smoke\n")
    assert registry.lineage(paths)["git_dirty"] == "true"
    git("commit", "-am", "smoke")
    (tmp_path / "new.py").write_text("")
    assert registry.lineage(paths)["git_dirty"] == "true"


def test_the_shipped_policy_sets_limits_for_the_tiny_profile() -> None:
    paths = Paths(ROOT)
    for profile in config.profiles(paths):
        registry.load_policy(paths, profile)
    tiny = registry.load_policy(paths, "tiny")
    assert set(tiny.gates) == {"thresholds", "champion", "data", "git", "serving"}
    assert tiny.thresholds["scenes.exact_match"].min == 0.9


def test_a_wrong_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(registry.PolicyError, match=r"policy\.yaml does not exist"):
        registry.load_policy(Paths(tmp_path), "tiny")
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "policy.yaml").write_text("tiny:\n  gates: [thresholds, beauty]\n")
    with pytest.raises(registry.PolicyError, match=r"tiny\.gates\.1"):
        registry.load_policy(Paths(tmp_path), "tiny")
