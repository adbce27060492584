"""The loop: a resumed training ends in the same bits, a folder has one trainer, and frozen tensors never change."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import profile
from vlv import config
from vlv.config import ConfigError, Optimizer, Training
from vlv.io import files
from vlv.io.stopping import Stopped
from vlv.training import loop, optim, state

SETTINGS = Training(
    steps=12, batch_size=8, accumulation=2, precision="fp32", seed=3, checkpoint_every=4, log_every=2,
    optimizer=Optimizer(
        learning_rate=1e-2, group_rates={"head": 3e-2}, betas=[0.9, 0.99], weight_decay=0.01, warmup_steps=2,
        schedule="cosine", clip_norm=1.0, ema_decay=0.9,
    ),
)  # fmt: skip


class _Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = 0.1 * torch.randn(batch.shape, generator=generator)
        return (
            (self.head(torch.tanh(self.body(self.frozen(batch + noise)))) - batch.sum(1, keepdim=True)).square().mean()
        )


def _batches(step: int) -> Iterator[torch.Tensor]:
    while True:
        for part in range(SETTINGS.accumulation):
            yield torch.randn(4, 4, generator=torch.Generator().manual_seed(step * SETTINGS.accumulation + part))
        step += 1


def _stopping(at: int) -> "Iterator[torch.Tensor]":
    """The same batches, but the process is asked to end while step `at` is computed."""

    def batches(step: int) -> Iterator[torch.Tensor]:
        import os
        import signal

        for count, batch in enumerate(_batches(step)):
            if step + count // SETTINGS.accumulation == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return batches  # type: ignore[return-value]


def _train(folder: Path, batches=_batches) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    model = _Regression()
    loop.train(model, batches, SETTINGS, folder, "same")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_stopped_anywhere_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    for stop in (0, 3, 7):
        with pytest.raises(Stopped, match="run it again"):
            _train(tmp_path / "cut", _stopping(stop))
    resumed = _train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = _Regression().state_dict()
    assert torch.equal(whole["frozen.weight"], start["frozen.weight"])
    assert not torch.equal(whole["body.weight"], start["body.weight"])


def test_one_process_may_train_in_one_precision_after_another(tmp_path: Path) -> None:
    """accelerate keeps the first precision of a process and refuses another one."""
    trained = {}
    for name, precision in (("first", "fp32"), ("half", "bf16"), ("again", "fp32")):
        model = _Regression()
        settings = SETTINGS.model_copy(update={"precision": precision})
        loop.train(model, _batches, settings, tmp_path / name, "same")
        trained[name] = model.body.weight
    assert torch.equal(trained["first"], trained["again"])
    assert not torch.equal(trained["first"], trained["half"])


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    _train(tmp_path / "damaged")
    newest = sorted((tmp_path / "damaged" / "checkpoints").glob("step-*"))[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert all(torch.equal(whole[k], v) for k, v in _train(tmp_path / "damaged").items())


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(state.CheckpointError, match="other settings"):
        loop.train(_Regression(), _batches, SETTINGS, tmp_path, "other")


def test_a_second_trainer_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with files.folder_lock(tmp_path, "Stage 1"), pytest.raises(files.LockHeldError, match=r"process \d+ \(Stage 1\)"):
        _train(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    def poisoned(step: int) -> Iterator[torch.Tensor]:
        while True:
            yield torch.full((4, 4), float("nan"))

    with pytest.raises(loop.DivergedError, match="at step 0"):
        _train(tmp_path, poisoned)


def test_a_step_that_does_not_fit_says_what_helps(tmp_path: Path) -> None:
    def batches(step: int) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(1).expand(2**44, 4)  # no memory by itself; its first use needs 2^48 bytes

    with pytest.raises(loop.OutOfMemoryError, match=r"accumulation: 4.*vlv plan") as caught:
        _train(tmp_path, batches)
    assert "gradient_checkpointing: true" in str(caught.value) and "frozen_precision" not in str(caught.value)


def test_a_group_that_matches_no_parameter_is_refused() -> None:
    settings = SETTINGS.optimizer.model_copy(update={"group_rates": {"haed": 1.0}})
    with pytest.raises(ValueError, match="haed"):
        optim.build(optim.trainable(_Regression()), settings)


def test_the_longest_prefix_sets_the_learning_rate() -> None:
    settings = SETTINGS.optimizer.model_copy(update={"group_rates": {"head": 3e-2, "head.bias": 4e-2}})
    model = _Regression()
    rates = {id(p): g["lr"] for g in optim.build(optim.trainable(model), settings).param_groups for p in g["params"]}
    assert rates[id(model.body.weight)] == 1e-2
    assert rates[id(model.head.weight)] == 3e-2 and rates[id(model.head.bias)] == 4e-2


def test_the_old_name_of_the_timeout_is_refused_with_the_new_one() -> None:
    smoke = profile("smoke").model_dump(by_alias=True)
    smoke["compute"]["patience_minutes"] = 5.0
    with pytest.raises(ConfigError, match=r"compute\.patience_minutes is now compute\.timeout_minutes"):
        config.validate(smoke, "params.yaml")
