"""A captioner that learned nothing from your photographs is reported, and no profile name promotes it."""

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from flows import artifacts
from tests import image_sets
from tests.conftest import ROOT, tiny
from tests.test_registry import GOOD, SCRIPT
from vlv import config, registry, tracking
from vlv.config import Paths
from vlv.data.import_.importer import Wanted, import_images
from vlv.data.import_.recipe import Recipe, Shares
from vlv.evaluation import intervals, metrics
from vlv.evaluation.metrics import Compared
from vlv.evaluation.similarity import SentenceModel, cosines
from vlv.io import files
from vlv.io.tables import numbers
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.registry.policy import below_thresholds
from vlv.stages import evaluate

THINGS = ["bicycle", "bridge", "candle", "castle", "guitar", "harbour", "kitchen", "mountain", "teapot", "violin"]
PLACES = ["autumn", "daylight", "fog", "moonlight", "rain", "snow", "spring", "summer"]


def captions(count: int) -> list[str]:
    """Ordinary sentences, no two alike."""
    return [f"An old {THINGS[i % 10]} photographed in the {PLACES[i // 10]}." for i in range(count)]


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights that tells the words of these sentences and of the tiny world apart."""
    folder = tmp_path_factory.mktemp("sentences")
    written = " ".join(captions(80)).replace(".", " .").split()
    core = Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *sorted(set(written))])}, unk_token="[UNK]"
    ))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    # As the published ones have it; an empty caption is then a sentence too.
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=64, initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, sentence_model: Path) -> Paths:
    """Photographs with captions, evaluated with the tiny profile's parts as they are before any training."""
    paths = _bare(tmp_path_factory.mktemp("photos"))
    folder = paths.root / "own"
    folder.mkdir()
    for i, caption in enumerate(captions(24)):
        (folder / f"{i:02d}.jpg").write_bytes(image_sets.photo(i))
        (folder / f"{i:02d}.txt").write_text(caption)
    import_images(folder, paths.data, Wanted(Recipe(64, 64, 2.0, "png"), 100, Shares(0.1, 0.5, 0)))
    evaluate.run(_trained(paths, sentence_model), paths)
    return paths


def _bare(folder: Path) -> Paths:
    """A folder with the shipped policy and parts."""
    (folder / "mlflow").mkdir()
    shutil.copy(ROOT / "mlflow" / "policy.yaml", folder / "mlflow")
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    return Paths(folder)


def _trained(paths: Paths, sentence_model: Path) -> config.Config:
    """The settings of `photos`, and the models of both stages in work/ as a training without effect leaves them."""
    raw = tiny().model_dump(mode="json", by_alias=True)
    raw["profile"] = "photos"  # has no section of its own in the policy
    raw["data"]["source"] = {"kind": "imported", "description": "own photographs"}
    raw["evaluate"] |= {
        "captions": 10, "reconstructions": 8, "steps": 2, "feature_network": None,
        "sentence_model": str(sentence_model), "untrained_baseline": False,
    }  # fmt: skip
    settings = config.Config.model_validate(raw)
    Autoencoder.build(settings, paths).save(paths.work / "stage1" / "model", settings, paths, "card")
    Captioner.build(settings, paths).save(paths.work / "stage2" / "model", settings, paths, "card")
    return settings


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "VLV_PARENT_RUN_ID", "VLV_FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


Register = Callable[[str, dict[str, Any]], int]


@pytest.fixture
def register(project: Paths, tmp_path: Path) -> Register:
    """register(name, figures) -> version, of the profile `photos`, committed and with valid data."""
    (tmp_path / "script.py").write_text(SCRIPT)
    package = tmp_path / "toy_spelling"
    package.mkdir()
    (package / "__init__.py").write_text("def spell(word: str) -> str:\n    return word.upper()\n")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "word.txt").write_text("cat")

    with tracking.start_run(project, "register", system_metrics=False) as run:
        run_id = run.wait_for_id()

    def make(name: str, figures: dict[str, Any]) -> int:
        files.write_json(tmp_path / "evaluate.json", figures)
        return registry.register(
            project, name, dataclasses.replace(registry.CAPTIONER, script=tmp_path / "script.py"),
            model_folder=tmp_path / "weights", example={"image": [base64.b64encode(b"picture").decode()]},
            evaluation=tmp_path / "evaluate.json", tags={**GOOD, "profile": "photos"},
            run_id=run_id, code=package,
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_evaluation_names_a_model_that_is_not_better_than_shuffled(project: Paths) -> None:
    measured = files.read_json(project.metrics / "evaluate.json")
    assert set(measured["not_better_than_shuffled"]) >= {"captions.similarity"}
    assert "scenes" not in measured
    versus = measured["captions"]["versus_shuffled"]["similarity"]
    assert versus["low"] <= 0 <= versus["high"] and versus["better"] is False
    shuffled = measured["captions"]["baselines"]["shuffled"]["similarity"]
    assert versus["difference"] == pytest.approx(measured["captions"]["similarity"] - shuffled, abs=2e-4)
    drawn = measured["reconstruction"]
    gained = drawn["psnr"] - drawn["baselines"]["shuffled"]["psnr"]
    assert drawn["versus_shuffled"]["psnr"]["difference"] == pytest.approx(gained, abs=2e-3)
    assert registry.lineage(project)["not_better_than_shuffled"].startswith("captions.similarity")


@pytest.mark.slow
def test_with_a_known_truth_it_is_named_and_refused_as_well(scene_data: Path, sentence_model: Path) -> None:
    paths = _bare(scene_data.parent)
    measured = evaluate.run(_trained(paths, sentence_model), paths)
    versus = measured["scenes"]["versus_shuffled"]
    assert set(versus) == {name for name in measured["scenes"]["baselines"]["shuffled"] if name != "n"}
    for name, one in versus.items():
        gained = measured["scenes"][name] - measured["scenes"]["baselines"]["shuffled"][name]
        assert one["difference"] == pytest.approx(gained, abs=2e-4)
    assert {"scenes.object_recall", "scenes.exact_match"} <= set(measured["not_better_than_shuffled"])
    assert set(measured["reconstruction"]["versus_shuffled"]) == {"psnr", *versus}
    assert (paths.plots / "evaluate.png").exists()
    failures = below_thresholds(registry.load_policy(paths, "photos"), numbers(measured), None)
    assert any(one.startswith("scenes.versus_shuffled.object_recall.low is ") for one in failures)


@pytest.mark.slow
def test_the_report_says_so(project: Paths) -> None:
    (sentence, *_) = artifacts.not_better_than_shuffled(project)
    assert sentence.startswith("captions.similarity is not clearly better than on shuffled images: 0.")
    written = StringIO()
    artifacts.show(Console(file=written, width=200), project, {"evaluate": "ran"}, 1.0, "")
    assert sentence in written.getvalue()
    assert artifacts.figures(project)[0].title == "10 captions against the true ones"
    assert artifacts.not_better_than_shuffled(Paths(project.root / "nothing here")) == []


@pytest.mark.slow
def test_no_profile_name_promotes_it(project: Paths, register: Register) -> None:
    register("unlearned", files.read_json(project.metrics / "evaluate.json"))
    with pytest.raises(registry.PromotionRefused) as refused:
        registry.promote(project, "unlearned")
    (why,) = (one for one in refused.value.failures if "captions." in one)
    assert why.startswith("thresholds: captions.versus_shuffled.similarity.low is -")
    assert "must be more than 0 (the captions are not clearly nearer to their own image's true caption" in why
    assert not any(one.startswith(("data", "git", "serving", "champion")) for one in refused.value.failures)


def _learned(sentence_model: Path) -> dict[str, Any]:
    """The evaluation of a model that reads and draws its images well, without a known truth."""
    rng = np.random.default_rng(0)
    true = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(12)]
    drawn = [np.clip(one + rng.normal(0, 9, one.shape), 0, 255).astype(np.uint8) for one in true]
    near = (Compared(12, drawn=shown, true=true) for shown in (drawn, intervals.shuffled(drawn)))
    own = (
        Compared(12, cosines=values) for values in cosines(SentenceModel(sentence_model), captions(12), captions(12))
    )
    return {"captions": _measured("captions", *own), "reconstruction": _measured("reconstruction", *near)}


def _measured(part: metrics.Part, ours: Compared, shuffled: Compared) -> dict[str, Any]:
    versus = intervals.versus(metrics.terms(part, ours), metrics.terms(part, shuffled))
    return {**metrics.measure(part, ours), intervals.KEY: versus}


@pytest.mark.slow
def test_a_model_that_did_learn_becomes_champion_without_a_known_truth(
    project: Paths, register: Register, sentence_model: Path
) -> None:
    figures = _learned(sentence_model)
    assert intervals.not_better(figures) == {}
    register("learned", figures)
    assert registry.promote(project, "learned").version == 1  # all gates of the shipped policy, serving among them
    figures["captions"]["similarity"] -= 0.1
    register("learned", figures)
    with pytest.raises(
        registry.PromotionRefused, match=r"champion: captions\.similarity is 0\.9, but must be at least 0\.99"
    ):
        registry.promote(project, "learned")


def test_default_refuses_what_was_never_compared_and_scenes_that_were_not_read(sentence_model: Path) -> None:
    policy = registry.load_policy(Paths(ROOT), "photos")

    def refused(figures: dict[str, Any]) -> list[str]:
        return below_thresholds(policy, numbers(figures), None)

    figures = _learned(sentence_model)
    assert refused(figures) == []
    for low, passes in ((0.02, True), (0.0, False), (-0.01, False)):
        scenes = {"object_recall": 0.1, intervals.KEY: {"object_recall": {"low": low, "high": 0.1}}}
        failures = refused({**figures, "scenes": scenes})
        assert (failures == []) is passes
        assert passes or failures[0].startswith("scenes.versus_shuffled.object_recall.low is ")
    few = intervals.difference(intervals.means(np.ones(5)), intervals.means(np.zeros(5))).to_json()
    figures["captions"][intervals.KEY]["similarity"] = json.loads(json.dumps(few))
    (failure,) = refused(figures)
    assert "low is not among the version's figures" in failure and "at least 6 test images" in failure
    assert len(refused({})) == 2
