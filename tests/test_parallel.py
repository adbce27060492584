"""Two processes (gloo) and one have the same samples, random numbers and losses; each resumes the other's."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import projects
from tests.conftest import ROOT
from tests.train_together import STEPS, train
from vlv import rng
from vlv.config import ConfigError, Timesteps
from vlv.io import files, json_lines
from vlv.models.decoders.base import draw_timesteps
from vlv.training import distributed, launch

LAUNCH = ROOT / "configs" / "accelerate"
pytestmark = pytest.mark.training
TOLERANCE = 1e-5


def _together(plan: str, jobs: list[dict[str, Any]]) -> None:
    """Run trainings in as many processes as a shipped file says."""
    command = [sys.executable, "-m", "tests.train_together", json.dumps(jobs, default=str)]
    launch.run(command, LAUNCH / f"{plan}.yaml", ROOT, projects.environment(OMP_NUM_THREADS="1"))


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json_lines.read(folder / "curve.jsonl")]


def _samples(folder: Path) -> dict[int, set[str]]:
    """Step -> the keys that any process took for it."""
    taken: dict[int, set[str]] = defaultdict(set)
    for path in folder.glob("samples-*.jsonl"):
        for row in json_lines.read(path):
            taken[row["step"]] |= set(row["keys"])
    return taken


def _same(folder: Path, reference: Path) -> None:
    assert len(_losses(folder)) == STEPS
    assert _losses(folder) == pytest.approx(_losses(reference), abs=TOLERANCE)
    assert _samples(folder) == _samples(reference)
    ours, theirs = files.read_json(folder / "trained.json"), files.read_json(reference / "trained.json")
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def data(_scene_data: Path) -> Path:
    return _scene_data


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in one process, and a Stage 1 that stopped in its third step, for several processes to resume."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in ("stage1", "stage2"):
        train(stage, data, folder / stage)
    train("stage1", data, folder / "stopped", stop_at=2)
    return folder


@pytest.fixture(scope="module")
def ddp(data: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    _continue(alone / "stopped", folder / "from_one")
    _together("cpu-ddp", [
        {"stage": "stage1", "data": data, "folder": folder / "stage1", "accumulation": 2},
        {"stage": "stage2", "data": data, "folder": folder / "stage2", "accumulation": 2},
        {"stage": "stage1", "data": data, "folder": folder / "from_one"},
        {"stage": "stage1", "data": data, "folder": folder / "stopped", "stop_at": 3},
    ])  # fmt: skip
    return folder


def _continue(stopped: Path, folder: Path) -> None:
    subprocess.run(["cp", "-r", str(stopped), str(folder)], check=True)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_ddp_equals_one_process(ddp: Path, alone: Path, stage: str) -> None:
    """With two micro-batches as well. Captions differ in length, so a mean of means would not be the mean."""
    _same(ddp / stage, alone / stage)


def test_counting_operations_changes_no_bit(alone: Path, data: Path, tmp_path: Path) -> None:
    """A training that was killed before its first checkpoint starts again, but does not count again."""
    counted = files.read_json(alone / "stage2" / "ledger.json")["flops_per_step"]
    files.write_json(tmp_path / "ledger.json", {"flops_per_step": counted})
    train("stage2", data, tmp_path)
    assert files.read_json(tmp_path / "trained.json") == files.read_json(alone / "stage2" / "trained.json")


def test_two_processes_resume_a_training_of_one(ddp: Path, alone: Path) -> None:
    assert not (alone / "stopped" / "trained.json").exists()
    _same(ddp / "from_one", alone / "stage1")


def test_one_process_resumes_a_training_of_two(ddp: Path, alone: Path, data: Path, tmp_path: Path) -> None:
    """One of the two was asked to stop. Both saved and left at the end of that step."""
    assert max(_samples(ddp / "stopped")) == 3
    _continue(ddp / "stopped", tmp_path / "from_two")
    train("stage1", data, tmp_path / "from_two")
    _same(tmp_path / "from_two", alone / "stage1")


def test_sharded_parameters_train_save_and_resume_the_same(ddp: Path, alone: Path, data: Path, tmp_path: Path) -> None:
    """FSDP 2: Stage 2 from the start; Stage 1, its activations recomputed, from what DDP left."""
    _continue(ddp / "stopped", tmp_path / "from_ddp")
    _together("cpu-fsdp", [
        {"stage": "stage2", "data": data, "folder": tmp_path / "stage2", "accumulation": 2},
        {"stage": "stage1", "data": data, "folder": tmp_path / "from_ddp", "gradient_checkpointing": True},
    ])  # fmt: skip
    _same(tmp_path / "stage2", alone / "stage2")
    _same(tmp_path / "from_ddp", alone / "stage1")


def test_random_numbers_do_not_depend_on_the_number_of_processes() -> None:
    stratified = Timesteps(mode="stratified", high_noise_share=0.5)

    def drawn(part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = rng.PartGenerator(7, part, parts)
        count = 12 // parts
        first = rng.normal((count, 3, 5), generator)
        return first, draw_timesteps(stratified, count, 1000, generator), rng.normal((count, 2), generator)

    whole = drawn(0, 1)
    for parts in (2, 3, 6):
        pieces = [drawn(part, parts) for part in range(parts)]
        for i, tensor in enumerate(whole):
            assert torch.equal(torch.cat([piece[i] for piece in pieces]), tensor)
    plain = torch.Generator().manual_seed(7)
    assert torch.equal(torch.randn(12, 3, 5, generator=plain), whole[0]), (
        "one process gets the numbers of a plain generator"
    )


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    from tests.test_training import SETTINGS

    with pytest.raises(ConfigError, match="8 samples of a step cannot be divided evenly among 3 processes"):
        distributed.micro_batch_size(SETTINGS, SETTINGS.batch_size)
