"""The costs of a training are counted, and summed over its sessions."""

import time
from pathlib import Path

import pytest
import torch

from tests.test_training import SETTINGS, _batches, _Regression, _stopping
from vlv.config import Compute
from vlv.io import files
from vlv.io.stopping import Stopped
from vlv.training import ledger, loop


def test_sessions_add_up_and_operations_are_counted(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        loop.train(_Regression(), _stopping(3), SETTINGS, tmp_path, "same")
    first = files.read_json(tmp_path / ledger.NAME)
    assert (first["sessions"], first["samples"]) == (1, 4 * SETTINGS.batch_size)
    loop.train(_Regression(), _batches, SETTINGS, tmp_path, "same")
    both = files.read_json(tmp_path / ledger.NAME)
    assert (both["sessions"], both["samples"]) == (2, SETTINGS.steps * SETTINGS.batch_size)
    assert both["device_seconds"] > first["device_seconds"] > 0
    # A sample passes Linear 4-4, 4-16, 16-1 forward (2 operations a weight). Backward: the weights of the last two
    # (2 each), and the input of the last one; nothing in front of them learns.
    per_sample = 2 * (16 + 64 + 16) + 2 * (64 + 16) + 2 * 16
    assert both["flops_per_step"] == per_sample * SETTINGS.batch_size
    assert both["flops"] == both["flops_per_step"] * SETTINGS.steps


def test_counting_changes_no_bit(tmp_path: Path) -> None:
    """A resumed training does not count again, so counting must not change its weights."""
    counted, not_counted = _Regression(), _Regression()
    loop.train(counted, _batches, SETTINGS, tmp_path / "counted", "same")
    files.write_json(tmp_path / "not" / ledger.NAME, {"flops_per_step": 1})
    loop.train(not_counted, _batches, SETTINGS, tmp_path / "not", "same")
    assert files.read_json(tmp_path / "not" / ledger.NAME)["flops_per_step"] == 1
    assert all(map(torch.equal, counted.parameters(), not_counted.parameters()))


def test_money_and_utilisation_need_a_price_and_a_peak(tmp_path: Path) -> None:
    sums = {"sessions": 1, "device_seconds": 7200.0, "samples": 10, "flops": 36_000, "flops_per_step": 1}
    files.write_json(tmp_path / ledger.NAME, sums)
    unpriced = ledger.costs(tmp_path, Compute())
    assert unpriced["money"] is unpriced["utilisation"] is None
    priced = ledger.costs(tmp_path, Compute(price_per_device_hour=1.5, peak_flops=10.0))
    assert (priced["money"], priced["utilisation"]) == (3.0, 0.5)


def test_the_ledger_counts_every_device(tmp_path: Path) -> None:
    eight = ledger.Ledger(tmp_path, devices=8)
    time.sleep(0.05)
    eight.write()
    assert files.read_json(tmp_path / ledger.NAME)["device_seconds"] >= 8 * 0.05
