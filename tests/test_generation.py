"""How a captioner writes: a converted release as the release does, our own models greedily to their <eos>."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.conftest import profile
from tests.test_convert import released
from vlv import config
from vlv.cli import main as cli
from vlv.config import Generation, Paths
from vlv.convert import release
from vlv.io import files, images
from vlv.models.captioner import Captioner
from vlv.models.language_model import clean_up

_LANGUAGE_MODEL = "pretrained/tiny/language_model"


def _smoke(language_model: Path) -> config.Config:
    """The smoke profile in the release's form, with a language model that knows sentences."""
    value = profile("smoke")
    encoder = value.encoder.model_copy(update={"start_on_text_side": False})
    changes = {"prefix_positions": False, "standardise_context": False}
    writer = value.language_model.model_copy(
        update={**changes, "weights": "pretrained", "pretrained": str(language_model)}
    )
    return value.model_copy(update={"encoder": encoder, "language_model": writer})


@pytest.fixture(scope="module", params=["ends", "never ends"])
def language_model(request: pytest.FixtureRequest, paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model; or one whose own settings name an end that it was never taught, like the release's."""
    folder = tmp_path_factory.mktemp("language-model") / "model"
    shutil.copytree(paths.root / _LANGUAGE_MODEL, folder)
    if request.param == "never ends":
        settings = files.read_json(folder / "generation_config.json")
        files.write_json(folder / "generation_config.json", settings | {"eos_token_id": settings["bos_token_id"]})
    return folder


@pytest.fixture(scope="module")
def checkpoint(language_model: Path, paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt in the release's layout."""
    captioner = Captioner.build(_smoke(language_model), paths)
    with torch.no_grad():
        for p in captioner.prefix.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    inner = {n: t for n, t in captioner.state_dict().items() if n.startswith(("encoder.", "conditioner."))}
    tensors = {f"VLV_model.{name}": tensor for name, tensor in released(inner).items()}
    tensors |= {f"mlp.{name}": tensor.detach() for name, tensor in captioner.prefix.named_parameters()}
    tensors |= {f"qwen2_model.{name}": tensor for name, tensor in captioner.language_model.state_dict().items()}
    path = tmp_path_factory.mktemp("release") / "model.pt"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path, language_model: Path, paths: Paths) -> Path:
    folder = checkpoint.parent / "converted"
    release.stage2(checkpoint, folder, _smoke(language_model), paths)
    return folder


def _pictures(count: int = 2) -> list[images.Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 80, 100, 3), np.uint8))


def _process(caption: str) -> str:
    """The release's clean-up, written independently: letter by letter, without regular expressions."""
    if "." in caption and caption[-1] != ".":
        while caption[-1] != ".":
            caption = caption[:-1]
    sentences, current, k = [], "", 0
    while k < len(caption):
        if caption[k].isspace() and k and caption[k - 1] in ".!?":
            sentences.append(current)
            current = ""
            while k < len(caption) and caption[k].isspace():
                k += 1
            continue
        current, k = current + caption[k], k + 1
    told: list[str] = []
    for sentence in [*sentences, current]:
        if sentence and sentence not in told:
            told.append(sentence)
    return " ".join(told)


def _written_by_the_release(checkpoint: Path, language_model: Path, context: torch.Tensor) -> list[str]:
    """What the release's generate does after the text encoder, on its own tensors and stock classes."""
    # The release stores checkpoints like this; the test made this one, and only tensors are read.
    tensors = torch.load(checkpoint, weights_only=True)
    inputs, hidden = tensors["mlp.layers.0.weight"].shape[::-1]
    mlp = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, len(tensors["mlp.layers.2.bias"])))
    mlp.load_state_dict({n.removeprefix("mlp.layers."): t for n, t in tensors.items() if n.startswith("mlp.")})
    writer = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32, attn_implementation="eager")
    writer.load_state_dict({n.removeprefix("qwen2_model."): t for n, t in tensors.items() if n.startswith("qwen2")})
    with torch.no_grad():
        embeddings = mlp(context)
        ids = writer.eval().generate(
            inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=300, num_beams=4, early_stopping=True,
        )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language_model)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def test_a_converted_release_writes_what_the_release_writes(
    checkpoint: Path, converted: Path, language_model: Path, paths: Paths
) -> None:
    captioner = Captioner.load(converted, paths)
    context = captioner.context(captioner.encoder.preprocessing.cut(_pictures()))
    context *= torch.linspace(0.5, 4, len(context))[:, None, None]  # further apart than random weights put them
    raw = _written_by_the_release(checkpoint, language_model, context)
    expected = [_process(text) for text in raw]
    assert captioner.write(context) == expected
    assert len(set(expected)) > 1 and all(expected)
    if files.read_json(language_model / "generation_config.json")["eos_token_id"] != captioner.tokenizer.eos_token_id:
        assert raw != expected, "what never ends has something to tidy"
    captioner.generation = Generation()
    assert captioner.write(context) != expected, "greedy, to its <eos>, is another way of writing"


def test_the_saved_model_says_how_it_writes(converted: Path, paths: Paths, tmp_path: Path) -> None:
    saved = json.loads((converted / "config.json").read_text())["config"]
    assert saved["language_model"]["generation"] == {
        "beams": 4, "max_tokens": 300, "begin": "prefix", "end": "language_model", "clean_up": True,
    }  # fmt: skip
    assert saved["data"]["resize"] == "torchvision"
    assert Captioner.load(converted, paths).generation == release.GENERATION


def test_our_own_models_write_greedily_to_their_eos_without_clean_up(paths: Paths, tmp_path: Path) -> None:
    settings = profile("smoke")
    assert settings.language_model.generation == Generation(
        beams=1, max_tokens=None, begin="tokenizer", end="tokenizer", clean_up=False
    )
    captioner = Captioner.build(settings, paths).eval()
    context = captioner.context(captioner.encoder.preprocessing.cut(_pictures(2)))
    table, bos = captioner.language_model.get_input_embeddings(), captioner.tokenizer.bos_token_id
    with torch.no_grad():
        inputs = torch.cat([captioner.prefix(context), table(torch.full((2, 1), bos))], 1)
        greedy = captioner.language_model.generate(
            inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long), num_beams=1,
            max_new_tokens=settings.stage2.max_caption_tokens, do_sample=False,
        )  # fmt: skip
    texts = [text.strip() for text in captioner.tokenizer.batch_decode(greedy, skip_special_tokens=True)]
    assert captioner.write(context) == texts


def test_vlv_caption_can_override_how_a_model_writes(
    converted: Path, paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    for number, pixels in enumerate(_pictures(2)):
        files.write_bytes(folder / f"{number}.png", images.encode_png(pixels))
    monkeypatch.setenv("VLV_ROOT", str(paths.root))

    def written(*options: str) -> list[str]:
        output = tmp_path / "captions.json"
        command = ["caption", str(folder), "-o", str(output), "--model", str(converted), *options]
        result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return list(files.read_json(output).values())

    captioner = Captioner.load(converted, paths)

    def expected(**changes: Any) -> list[str]:
        captioner.generation = release.GENERATION.model_copy(update=changes)
        return captioner.caption(_pictures(2))

    assert written("--max-tokens", "40") == expected(max_tokens=40)
    otherwise = written("--beams", "2", "--max-tokens", "25", "--as-written")
    assert otherwise == expected(beams=2, max_tokens=25, clean_up=False)


def test_clean_up_equals_that_of_the_release() -> None:
    draw = random.Random(5)
    pieces = ["A dog", "A cat. ", "A dog. ", ".", "! ", "? ", "  ", "\n", "e.g. it", "3.5", "A cat.\tA dog.", "Yes!"]
    for _ in range(3000):
        caption = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 9)))
        assert clean_up(caption) == _process(caption), repr(caption)
    assert clean_up("A dog runs. A dog runs. It is brown. It has a") == "A dog runs. It is brown."
    assert clean_up("no full stop") == "no full stop" and clean_up("") == ""
