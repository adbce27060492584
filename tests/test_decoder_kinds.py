"""Kinds of decoders: the table, a kind from outside the package, and refused kinds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, profile
from vlv import config
from vlv.config import Config, ConfigError, Paths
from vlv.config.parts import DECODERS
from vlv.inputs import closure
from vlv.io import files
from vlv.models import build
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner
from vlv.models.saved import ModelFolderError
from vlv.stages import inputs
from vlv.training import blocks, loop

TOY = "tests.toy_decoder"


def _with_toy(kind: str = TOY, **decoder: object) -> Config:
    """The smoke profile with the toy kind."""
    smoke = profile("smoke")
    section = smoke.decoder.model_copy(update={"kind": kind, "options": {"width": 12}, **decoder})
    encoder = smoke.encoder.model_copy(update={"start_on_text_side": False})
    return smoke.model_copy(update={"decoder": section, "encoder": encoder})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package my_package with a kind my_decoder, which could be imported but must not be."""
    folder = tmp_path / "elsewhere" / "my_package"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "toy_decoder.py", folder / "my_decoder.py")
    (folder / "__init__.py").write_text("raise SystemExit('it was run')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_the_table_names_every_module_that_is_a_kind() -> None:
    folder = ROOT / "vlv" / "models" / "decoders"
    kinds = {path.stem for path in folder.glob("*.py") if "def build(" in path.read_text(encoding="utf-8")}
    assert kinds == set(DECODERS)
    for name in DECODERS:
        assert callable(build.kind(profile("tiny").decoder.model_copy(update={"kind": name})).build_conditioner)


# -- a kind from outside the package ---------------------------------------------------------------------


@pytest.mark.training
def test_a_kind_from_outside_trains_and_is_saved_and_loaded(paths: Paths, tmp_path: Path) -> None:
    toy = _with_toy()
    one_step = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "gradient_checkpointing": True}
    settings = toy.model_copy(update={"stage1": toy.stage1.model_copy(update=one_step)})
    model = Autoencoder.build(settings, paths)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses: list[float] = []
    loop.train(
        model, lambda step: iter([Stage1Batch(pictures)]), settings.stage1, tmp_path / "training", "toy",
        lambda step, values: losses.append(values["loss"]),
    )  # fmt: skip
    assert len(losses) == 1 and 0 < losses[0] < 10
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "encoder.queries" in moved and not any(name.startswith("decoder.") for name in moved)
    model.save(tmp_path / "model", settings, paths, "card")
    loaded = Autoencoder.load(tmp_path / "model", paths)
    context = loaded.context(pictures)
    assert torch.equal(context, model.context(pictures))
    assert loaded.decoder.sample(context, [1, 2, 3, 4], steps=2, guidance=2.0).shape == pictures.shape
    assert Captioner.build(settings, paths).context(pictures).shape == (4, settings.encoder.queries, 12)


def test_its_blocks_and_its_denoiser_are_found(paths: Paths) -> None:
    decoder = build.decoder(_with_toy().decoder, paths)
    assert "ToyDenoiser" in blocks.names(decoder)
    assert isinstance(decoder.denoiser, nn.Module) and decoder.denoiser in list(decoder.modules())


def test_its_code_is_an_input_of_the_stages_but_is_not_run_to_find_it(paths: Paths, package: Path) -> None:
    module, numbers = package / "my_decoder.py", package / "numbers.py"
    text = module.read_text(encoding="utf-8").replace("= 100", "= FEW")
    text = text.replace("import torch\n", "import torch\nfrom my_package.numbers import FEW\n", 1)
    settings = _with_toy("my_package.my_decoder")

    def code(path: Path, written: str) -> dict[str, str]:
        path.write_text(written, encoding="utf-8")
        closure._package.cache_clear()
        return closure.hashes(inputs.decoder_code(settings.decoder))

    code(numbers, "FEW = 4\nUNUSED = 1\n")
    before = code(module, text)
    assert {"my_package.my_decoder", "my_package.numbers", "vlv.models.decoders.base"} <= before.keys()
    assert not [name for name in before if name.startswith("vlv.models.decoders.s")], "no other kind counts"
    assert before.keys() <= inputs.inputs("stage1", settings, paths)["code"].keys()
    assert code(module, text + "\n# A comment.\n") == before
    changed = code(module, text.replace("torch.tanh", "torch.relu"))
    assert {name for name in before if before[name] != changed[name]} == {"my_package.my_decoder"}
    assert code(module, text) == before
    assert code(numbers, "FEW = 4\nUNUSED = 2\n") == before
    assert code(numbers, "FEW = 5\nUNUSED = 1\n") != before


# -- refused kinds ---------------------------------------------------------------------------------------


def test_a_kind_that_does_not_exist_is_refused_by_the_configuration() -> None:
    text = files.read_text(ROOT / "configs" / "tiny.yaml")
    for wrong in ("sdxxl", "my package.decoder", "base", "my_package."):
        with pytest.raises(ConfigError, match=rf"decoder\.kind: .* there are: {', '.join(DECODERS)}, or"):
            config.parse(text.replace("kind: stable_diffusion", f"kind: {wrong}"), "params.yaml")


def test_a_missing_or_unsuitable_module_is_named(paths: Paths) -> None:
    missing = _with_toy("tests.nowhere")
    with pytest.raises(ConfigError, match=r"decoder\.kind: tests\.nowhere cannot be imported"):
        build.decoder(missing.decoder, paths)
    with pytest.raises(ConfigError, match=r"decoder\.kind: there is no module tests\.nowhere"):
        inputs.inputs("stage1", missing, paths)
    with pytest.raises(ConfigError, match=r"tests\.small_models is no kind .* does not define build_conditioner and"):
        build.decoder(_with_toy("tests.small_models").decoder, paths)
    with pytest.raises(ConfigError, match=r"decoder\.options\.width: .*The options of kind tests\.toy_decoder: width"):
        build.decoder(_with_toy(options={"width": 0}).decoder, paths)


def test_code_inside_a_model_folder_is_not_run(paths: Paths, package: Path) -> None:
    settings = _with_toy()
    model = package / "model"
    Autoencoder.build(settings, paths).save(model, settings, paths, "card")
    (model / "own").mkdir()
    for name in ("own.py", "own/__init__.py", "own/deep.py"):
        shutil.copy(package / "__init__.py", model / name)
    value = files.read_json_object(model / "config.json")

    def load(kind: str) -> None:
        value["config"]["decoder"]["kind"] = kind
        (model / "config.json").write_text(json.dumps(value), encoding="utf-8")
        Autoencoder.load(model, paths)

    for kind in ("my_package.model.own", "my_package.model.own.deep"):
        with pytest.raises(ModelFolderError, match=r"names code of its own as its kind of decoder .* is never run"):
            load(kind)
    for kind in ("my_package.model.compiled", "nowhere.at_all"):
        with pytest.raises(ModelFolderError, match=rf"the kind of decoder {kind}, and there is no such module"):
            load(kind)
