"""A stage's inputs are the code that it runs, its settings and its parts: all of them, and little else."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import projects
from tests.conftest import ROOT, profile
from vlv import config
from vlv.inputs import closure, source
from vlv.io import files
from vlv.stages import inputs

TRAINED = {"stage1", "stage2", "evaluate"}  # evaluate trains a baseline
MODELS = TRAINED | {"register"}  # a registered version contains the code that serves it


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package to edit."""
    return Path(shutil.copytree(source.PACKAGE, tmp_path / "vlv", ignore=shutil.ignore_patterns("__pycache__")))


def _codes(package: Path, kind: str = "tiny") -> dict[str, dict[str, str]]:
    """Stage -> hashes of its code, with the sources in `package`."""
    settings = profile(kind)
    sources = source.Sources(package)
    return {stage: closure.hashes(inputs.roots(stage, settings), sources) for stage in inputs.SETTINGS}


@functools.cache
def _unchanged(kind: str) -> dict[str, dict[str, str]]:
    return _codes(source.PACKAGE, kind)


def _changed(package: Path, edit: Callable[[], Any], kind: str = "tiny") -> set[str]:
    """The stages that an edit makes stale."""
    before = _unchanged(kind)
    edit()
    after = _codes(package, kind)
    return {stage for stage in before if before[stage] != after[stage]}


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(("file", "old", "new", "stale"), [
    ("models/decoders/base.py", "posterior.std * scale", "posterior.std * scale * 3.0", MODELS),
    ("models/decoders/stable_diffusion.py", "return self.condition(embeddings)\n",
     "return self.condition(embeddings) * 2.0\n", MODELS),
    ("tiny/scenes.py", "return Scene(background, tuple(sorted(objects)))", "return Scene(0, tuple(sorted(objects)))",
     {"evaluate"}),
    ("tiny/counting.py", "Counter(kind for _, kind in scene.objects)", "Counter(place for place, _ in scene.objects)",
     {"evaluate"}),
    ("tiny/recogniser.py", "background.argmax(-1).tolist()", "background.argmin(-1).tolist()", {"evaluate"}),
    ("data/loader.py", "+ self._rank * local", "+ self._rank * local + 1", TRAINED),
    ("io/images.py", "batch.float() / 127.5 - 1.0", "batch.float() / 127.5 - 1.1", MODELS),
    ("training/optim.py", "return warmup * share", "return share", TRAINED),
    ("config/trainable.py", "Parts({TEXT_DECODER})", "Parts({TEXT_ENCODER})", MODELS),
    ("config/trainable.py", "Parts({LANGUAGE_MODEL})", "Parts({ADAPTERS})", MODELS - {"stage1"}),
    ("models/captioner.py", "if begin is None else", "if begin == 7 else", MODELS - {"stage1"}),
    ("evaluation/metrics.py", "255**2", "256**2", {"evaluate"}),
    ("data/gate.py", "min_value=gate.min_side", "min_value=gate.min_side + 1", {"validate"}),
    ("registry/serving.py", "self.captioner.caption(_pictures(model_input))", "[]", {"register"}),
], ids=lambda value: value if isinstance(value, str) and value.endswith(".py") else "")  # fmt: skip
def test_a_change_that_influences_a_number_makes_its_stages_stale(
    package: Path, file: str, old: str, new: str, stale: set[str]
) -> None:
    assert _changed(package, lambda: _replace(package / file, old, new)) == stale


def _add(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_messages_plots_logs_and_other_decoders_make_nothing_stale(package: Path) -> None:
    before = _unchanged("tiny")
    _replace(package / "models/encoder.py", "learnable queries and a projection.", "queries.")
    _replace(package / "training/ledger.py", "operations and money, summed", "money, summed")
    _replace(package / "evaluation/figures.py", "#3867d6", "#ff0000")
    _replace(package / "training/loop.py", "the loss is {total} at step", "at step")
    _replace(package / "training/state.py", "going back to the one before it", "passed over")
    _add(package / "models/decoders/sd3.py", "\n\nNEW = 1\n")
    (package / "models/decoders/new.py").write_text("class NewDecoder: ...\n")
    _replace(package / "config/parts.py", '"sd3": "3 and 3.5"', '"sd3": "3 and 3.5", "new": "a new one"')
    (package / "evaluation/new_metric.py").write_text("def metric() -> float:\n return 1.0\n")
    _add(package / "tiny/counting.py", "\n\ndef new_metric() -> float:\n return 1.0\n")
    _add(package / "models/encoder.py", "\n# a comment\n")
    assert _codes(package) == before


def test_only_the_configured_kind_of_decoder_counts(package: Path) -> None:
    sd3 = package / "models/decoders/sd3.py"
    edit = lambda: _replace(sd3, "sigma * noise + (1.0 - sigma)", "sigma * noise + (1.1 - sigma)")  # noqa: E731
    assert _changed(package, edit, "sd35") == MODELS
    for kind in ("stable_diffusion", "sdxl", "sd3"):
        section = profile("tiny").decoder.model_copy(update={"kind": kind})
        found = closure.hashes(inputs.decoder_code(section))
        others = {"stable_diffusion", "sdxl", "sd3"} - {kind}
        assert not [name for name in found if name.rpartition(".")[2] in others]


def test_the_layout_of_the_source_does_not_matter(package: Path) -> None:
    import ast

    def relayout() -> None:
        for path in package.rglob("*.py"):
            path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")

    assert _changed(package, relayout) == set()


def test_a_name_that_does_not_exist_is_an_error() -> None:
    for root in ("vlv.nowhere:run", "vlv.io.images:nothing", "vlv.models.encoder:CaptionEncoder.nothing"):
        with pytest.raises(KeyError):
            closure.hashes([root])


def test_defaults_and_parts_are_inputs_and_cards_are_not(tmp_path: Path) -> None:
    settings = profile("tiny")
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")
    paths = config.Paths(tmp_path)

    def found() -> dict[str, Any]:
        return {stage: inputs.inputs(stage, settings, paths) for stage in inputs.SETTINGS}

    before = found()
    # A default that is not in params.yaml.
    assert before["stage1"]["settings"]["stage1"]["same_noise"] is False
    assert "accumulation" not in before["stage1"]["settings"]["stage1"]  # changes how a step is computed, not what
    card = tmp_path / "pretrained/tiny/encoder/README.md"
    card.write_text(card.read_text() + "One more word.\n")
    assert found() == before
    weights = tmp_path / "pretrained/tiny/language_model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    after = found()
    assert {stage for stage in before if before[stage] != after[stage]} == {"stage2", "evaluate", "validate"}


def test_the_dvc_graph_depends_on_the_librarys_inputs_and_settings() -> None:
    graph: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert sorted(graph["inputs"]["outs"]) == sorted(f"work/inputs/{stage}.json" for stage in inputs.SETTINGS)
    for stage, settings in inputs.SETTINGS.items():
        assert f"work/inputs/{stage}.json" in graph[stage]["deps"]
        # A default that params.yaml need not name is not a DVC parameter: it is in the inputs.
        assert set(settings) - set(graph[stage]["params"]) <= {"data.resize"}
        assert set(graph[stage]["params"]) <= set(settings)


@pytest.mark.training
def test_every_function_that_a_stage_calls_is_in_its_inputs(smoke: Path) -> None:
    script = projects.python(str(ROOT / "tests" / "called.py"), "called.json")
    done = projects.run(script, smoke, PYTHONPATH=str(smoke))
    assert done.returncode == 0, done.stderr
    called_by: dict[str, list[str]] = files.read_json(smoke / "called.json")
    # Settings validate themselves, and their values are inputs; `reporting` sends a worker's error to its parent;
    # Python asks the package's `__getattr__` for a submodule before it imports it.
    beside = (*closure.NEUTRAL, "vlv.config", "vlv.stages:", "vlv.training.launch:reporting", "vlv:__getattr__")
    for stage in inputs.SETTINGS:
        called = {name for name in called_by[stage] if not name.startswith(beside)}
        found = {f"{s.module}:{s.name}" for s in closure.symbols(inputs.roots(stage, profile("smoke")))}
        assert len(called) > 10
        assert called - found == set(), stage
