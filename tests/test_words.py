"""If captions do not fit the language model, the import warns, the run stops, and both name a profile that fits."""

import re
from pathlib import Path

import pytest
import yaml

from tests import image_sets
from tests.conftest import ROOT, tiny
from tests.test_vocabulary import ORDINARY, byte_level
from vlv import config
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.data import gate as expectations
from vlv.data.shards import DataError
from vlv.io import assets, files
from vlv.stages import validate, words


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """The tiny profile for imported images; beside it one whose language model knows all words, and `paper`."""
    paths = Paths(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    raw = tiny().model_dump(mode="json", by_alias=True)
    raw["data"]["source"] = {"kind": "imported", "description": "own photographs"}
    raw["data"]["gate"]["caption_words_min"] = 1
    _profile(paths.params, raw, "tiny")
    _profile(tmp_path / "configs" / "broken.yaml", {}, "broken")
    _profile(tmp_path / "configs" / "tiny.yaml", raw, "tiny")
    files.write_text(tmp_path / "configs" / "paper.yaml", (ROOT / "configs" / "paper.yaml").read_text(encoding="utf-8"))
    byte_level().save_pretrained(tmp_path / "all-words")
    raw["language_model"]["pretrained"] = "all-words"
    _profile(tmp_path / "configs" / "mine.yaml", raw, "mine")
    source = tmp_path / "own"
    source.mkdir()
    for i in range(24):
        (source / f"{i:02d}.jpg").write_bytes(image_sets.photo(i))
        (source / f"{i:02d}.txt").write_text(ORDINARY[i % 3])
    monkeypatch.setenv("VLV_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return paths


def _profile(path: Path, raw: dict[str, object], name: str) -> None:
    files.write_text(path, yaml.safe_dump({**raw, "profile": name}))


def _import(paths: Paths, capsys: pytest.CaptureFixture[str]) -> str:
    """What `vlv data import` says besides what it did."""
    with pytest.raises(SystemExit) as ended:
        cli.app(["data", "import", str(paths.root / "own"), "--validation", "0.1", "--test", "0.3"], prog_name="vlv")
    assert not ended.value.code
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_import_says_what_does_not_fit_and_which_profile_does(
    project: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _import(project, capsys)
    assert "do not fit the language model of the profile tiny, pretrained/tiny/language_model, which holds " in told
    assert re.search(r" and 0 of \d+ captions \(0.0%\); not held: ", told)
    assert "Profiles whose language model knows the words: mine. " in told
    assert "not on this machine: paper (hf:Qwen/Qwen2.5-3B@" in told
    assert "vlv config use NAME" in told
    settings = config.load(project)
    with pytest.raises(DataError) as refused:
        validate.run(settings, project)
    for one in ("train: words_held", "train: captions_held", "test: captions_held", "knows the words: mine."):
        assert one in str(refused.value)
    verdict = files.read_json(project.metrics / "validate.json")
    held = verdict["vocabulary"]["train"]
    assert not verdict["success"] and held["captions_held"] == 0 < held["captions"] and held["unknown"]["in"] > 0


def test_a_fitting_profile_imports_without_a_warning_and_passes(
    project: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    config.use(project, "mine")
    assert "language model" not in _import(project, capsys)
    settings = config.load(project)
    tokenizer = words.tokenizer(settings.language_model, project)
    verdict = expectations.validate(project.data, settings.data.gate, tokenizer=tokenizer)
    assert verdict.success and verdict.vocabulary["train"].unknown == {}


def test_a_language_model_that_is_not_on_this_machine_is_reported(
    project: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load(project.params.read_text())
    raw["language_model"]["pretrained"] = "hf:nobody/not-fetched@0000000000000000000000000000000000000000"
    _profile(project.params, raw, "tiny")
    assert "is not here yet; the run will check whether it knows their words" in _import(project, capsys)


def test_images_without_captions_need_no_words(project: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (project.root / "own").glob("*.txt"):
        path.unlink()
    assert "language model" not in _import(project, capsys)
    settings = config.load(project)
    gate = settings.data.gate.model_copy(update={"captions_required": False})
    tokenizer = words.tokenizer(settings.language_model, project)
    assert tokenizer is not None and expectations.validate(project.data, gate, tokenizer=tokenizer).success
    bare = settings.language_model.model_copy(update={"weights": "random", "architecture": "configs/architecture"})
    assert words.tokenizer(bare, project) is None


def test_at_hand_looks_on_this_machine_only(project: Paths) -> None:
    assert assets.at_hand("all-words", project) == project.root / "all-words"
    for absent in ("no-such-folder", "wheel:no-such-package==1.0!member", "hf:nobody/not-fetched"):
        assert assets.at_hand(absent, project) is None
    with pytest.raises(assets.AssetError, match="not of the form"):
        assets.at_hand("hf:nobody", project)
