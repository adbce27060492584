"""The copy for Weights & Biases: the curve arrives, and no fault of the copy delays a training."""

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from tests import servers
from vlv.config import Paths, Tracking
from vlv.tracking import wandb_copy as module
from vlv.tracking.wandb_copy import CLOSE_SECONDS, wandb_copy
from vlv.training import distributed


@pytest.fixture(autouse=True)
def training() -> None:
    """As in a stage that trains."""
    distributed.join()


def _records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    block, header, at, record = 32768, 7, 7, b""
    while at + header <= len(data):
        if (left := block - at % block) < header:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or a last part
            yield record
            record = b""


def _curve(folder: Path, key: str) -> list[tuple[int, float]]:
    """A curve as it lies in an offline run: (step, value)."""
    (file,) = folder.rglob("run-*.wandb")
    points = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if key in items:
            points.append((record.history.step.num, float(items[key])))
    return points


def test_the_curve_is_there_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 120.0)  # for what takes three on a quiet machine
    paths, settings = Paths(tmp_path), Tracking(wandb_project="vlv")
    with wandb_copy(settings, paths, "stage1", "stage1-abc", {"stage1": {"steps": 30}}) as copy:
        for step in (10, 20, 30):
            copy(step, {"loss": 1 / step})
    # wandb's own process writes the file, and may not have finished.
    servers.wait(lambda: len(_curve(paths.work / "wandb", "loss")) == 3, "the curve's file")
    assert _curve(paths.work / "wandb", "loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]


def test_without_a_project_nothing_is_written(tmp_path: Path) -> None:
    with wandb_copy(Tracking(), Paths(tmp_path), "stage1", "a", {}) as copy:
        copy(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dead_service_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:  # listens, and never answers
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        settings = Tracking(wandb_project="vlv", wandb_online=True)
        start = time.monotonic()
        with caplog.at_level(logging.WARNING), wandb_copy(settings, Paths(tmp_path), "stage1", "b", {}) as copy:
            copy(1, {"loss": 1.0})
            assert time.monotonic() - start < 5, "logging waited"
        assert time.monotonic() - start < CLOSE_SECONDS + 10
    assert "Weights & Biases does not answer" in caplog.text
