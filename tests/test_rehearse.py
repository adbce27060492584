"""The rehearsal: real steps, a real checkpoint, and memory that is measured and compared with the forecast."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import Qwen2Config

from tests.conftest import profile
from vlv import config
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.models import language_model
from vlv.models.captioner import Captioner
from vlv.plan.rehearse import PeakMemory, TooLargeError, rehearse

pytestmark = pytest.mark.training  # real steps, some of them in a process of their own
MIB = 2**20
T = TypeVar("T")


def _alone(function: Callable[..., T], *arguments: object) -> T:
    """Call the function in a process of its own, because this one may reuse or free memory of other tests."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(function, arguments)


def _peaks(file: Path) -> tuple[int, int]:
    """Measure two peaks in bytes: of 200 MiB that are allocated and freed twice, and of 300 MiB of `file` mapped."""
    with PeakMemory(torch.device("cpu")) as memory:
        memory.restart()
        for _ in range(2):
            held = torch.ones(200 * MIB // 4)
            time.sleep(0.1)  # memory is measured every hundredth of a second
            del held
        most = memory.peak()
        memory.restart()
        mapped = torch.from_file(str(file), size=300 * MIB, dtype=torch.uint8)
        assert mapped.max() == 0
        return most, memory.peak()


def test_the_peak_counts_what_is_held_at_once_and_not_what_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(300 * MIB))
    held, mapped = _alone(_peaks, file)
    assert 195 * MIB < held < 230 * MIB
    assert mapped < 30 * MIB


@pytest.fixture
def wide(tmp_path: Path) -> Callable[[int], config.Config]:
    """The smoke profile with a language model of a given vocabulary that has an architecture but no weights."""

    def settings(words: int) -> config.Config:
        Qwen2Config(
            vocab_size=words, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, tie_word_embeddings=True,
        ).save_pretrained(tmp_path / "language_model")  # fmt: skip
        smoke = profile("smoke")
        changed = {"weights": "random", "architecture": str(tmp_path / "language_model")}
        return smoke.model_copy(update={"language_model": smoke.language_model.model_copy(update=changed)})

    return settings


@pytest.mark.parametrize("learn", ["mlp", "mlp+llm"])
def test_two_steps_of_stage_2_take_the_memory_that_was_forecast(
    learn: str, wide: Callable[[int], config.Config], paths: Paths
) -> None:
    settings = wide(100_000)
    stage2 = settings.stage2.model_copy(update={"learn": learn, "max_caption_tokens": 200})
    done = _alone(rehearse, settings.model_copy(update={"stage2": stage2}), paths, "stage2", 2)
    assert done.peak == pytest.approx(done.expected, rel=0.15)
    learned = 60 * 12 * 1_000_000 if learn == "mlp+llm" else 0  # 60 M parameters with AdamW's two averages
    assert learned < done.checkpoint < learned + 30_000_000
    assert min(done.build, done.first_step, done.second_step) > 0


def test_a_model_without_tokenizer_learns_but_does_not_write(
    wide: Callable[[int], config.Config], paths: Paths
) -> None:
    settings = wide(1000)
    section = settings.language_model
    assert language_model.tokenizer(section, paths) is None
    assert language_model.build(section, paths).config.vocab_size == 1000
    with pytest.raises(ValueError, match="without a tokenizer"):
        Captioner.build(settings, paths).write(None)


def test_a_step_that_will_not_fit_is_not_started(wide: Callable[[int], config.Config], paths: Paths) -> None:
    with pytest.raises(TooLargeError, match=r"stage2 needs \d+.* GiB for 1 samples.*vlv plan"):
        rehearse(wide(200_000_000), paths, "stage2")


def test_the_command_rehearses_both_stages_with_changed_values(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLV_ROOT", str(paths.root))
    file = tmp_path / "rehearsal.json"
    smoke = str(paths.root / "configs" / "smoke.yaml")
    with pytest.raises(SystemExit) as ended:
        cli.app(
            ["rehearse", "--config", smoke, "--set", "stage2.learn=mlp+llm+encoder", "--json", str(file)],
            prog_name="vlv",
        )
    assert not ended.value.code
    assert "peak of the second step" in capsys.readouterr().out
    one, two = json.loads(file.read_text())
    assert (one["stage"], two["stage"]) == ("stage1", "stage2")
    for wrong in ("stage2.lern=mlp", "stage3.learn=mlp", "stage2.learn"):
        with pytest.raises(SystemExit) as refused:
            cli.app(["rehearse", "--config", smoke, "--set", wrong], prog_name="vlv")
        assert refused.value.code == cli.ANSWER
