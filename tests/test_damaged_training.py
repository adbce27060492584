"""A training resumes after its files were damaged: its figures are the same, and its MLflow run is correct."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from tests.conftest import tiny
from tests.test_training import SETTINGS, _batches, _Regression, _stopping
from vlv import tracking
from vlv.config import Paths
from vlv.io.stopping import Stopped
from vlv.stages import inputs
from vlv.stages.record import Record, training_record
from vlv.tracking import store
from vlv.tracking.run_record import NAME, Begin, RunRecord
from vlv.training import loop

pytestmark = pytest.mark.training

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def project(_scene_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(_scene_data, root / "data")
    return Paths(root)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "VLV_PARENT_RUN_ID", "VLV_FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def _train(project: Paths, stage: str, batches: Any = _batches) -> dict[str, Any]:
    record = Record(stage, project, inputs.TrainingHashes({}, "0" * 64))
    with training_record(record, tiny(), SETTINGS) as on_log:
        loop.train(_Regression(), batches, SETTINGS, record.training, "same", on_log)
        record.model.mkdir(parents=True)
    return record.result()


def _runs(project: Paths, stage: str) -> list[MlflowRun]:
    client = MlflowClient(tracking.tracking_uri(project))
    experiment = client.get_experiment_by_name("vlv")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"run_name = '{stage}'"))


def _steps(project: Paths, run: MlflowRun) -> list[int]:
    history = MlflowClient(tracking.tracking_uri(project)).get_metric_history(run.info.run_id, "loss")
    return sorted(point.step for point in history)


@pytest.fixture(scope="module")
def whole(project: Paths) -> tuple[str, float]:
    """The curve and the last loss of an undamaged training."""
    figures = _train(project, "whole")
    return (project.plots / "whole.csv").read_text(), figures["final_loss"]


def _garble_middle(path: Path) -> None:
    """Remove the line end between two rows, and overwrite a third row with bytes that are not text."""
    first, second, third, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:-9] + second + b"\xff\xfe" + third + b"".join(rest))


# File, damage and warning; None: no warning, because nothing is lost.
RECORD = "run-*/record.jsonl"
CASES: dict[str, tuple[str, Damage, str | None]] = {
    "record torn": (RECORD, lambda path: path.write_bytes(path.read_bytes()[:-20]), None),
    "record torn further": (RECORD, lambda path: path.write_bytes(path.read_bytes() + b'{"step": 8, "lo'), None),
    "record garbled": (RECORD, _garble_middle, "record.jsonl: 2 damaged lines"),
    "record emptied": (RECORD, lambda path: path.write_bytes(b""), None),
    "record of other things": (
        RECORD,
        lambda path: path.write_bytes(b'[1]\n{"step": "2"}\n{"loss": 0.1}\n'),
        "record.jsonl: 3 damaged lines",
    ),
    "record without its beginning": (
        RECORD,
        lambda path: path.write_bytes(b"[" * 100_000 + path.read_bytes()),
        "record.jsonl: 1 damaged lines",
    ),
    "ledger emptied": ("ledger.json", lambda path: path.write_bytes(b""), "ledger.json.damaged"),
    "ledger a list": ("ledger.json", lambda path: path.write_text("[1, 2]"), "ledger.json.damaged"),
    "ledger of words": (
        "ledger.json",
        lambda path: path.write_text('{"samples": "many", "flops_per_step": -1}'),
        "ledger.json.damaged",
    ),
    "manifests lists": (
        "checkpoints/step-00000008/manifest.json",
        lambda path: path.write_text("[]"),
        "step-00000008 is damaged",
    ),
    "manifests empty": (
        "checkpoints/step-00000008/manifest.json",
        lambda path: path.write_text("{}"),
        "step-00000008 is damaged",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_in_the_same_figures(
    project: Paths, whole: tuple[str, float], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage, said = CASES[case]
    with pytest.raises(Stopped):
        _train(project, case, _stopping(7))
    (folder,) = (project.work / case).glob("training-*")
    (path,) = folder.glob(name)
    damage(path)
    with caplog.at_level(logging.WARNING, logger="vlv"):
        figures = _train(project, case)
    curve, final_loss = whole
    assert (project.plots / f"{case}.csv").read_text() == curve
    assert figures["final_loss"] == final_loss
    assert said is None or said in caplog.text
    assert said is not None or "damaged" not in caplog.text
    # One finished run with each point once: the folder's name identifies the run, whatever happened to its file.
    (run,) = _runs(project, case)
    assert run.info.status == "FINISHED"
    assert _steps(project, run) == list(range(SETTINGS.log_every, SETTINGS.steps + 1, SETTINGS.log_every))


def test_a_training_that_is_stopped_is_killed_not_failed(project: Paths) -> None:
    with pytest.raises(Stopped):
        _train(project, "stopped", _stopping(3))
    (run,) = _runs(project, "stopped")
    assert run.info.status == "KILLED"


def test_a_damaged_record_blocks_nothing(project: Paths, caplog: pytest.LogCaptureFixture) -> None:
    uri = tracking.prepare(project)
    begin = Begin(uri, "vlv", None, "damaged record", 1_700_000_000_000)
    paths = []
    for _ in range(3):
        record = RunRecord.create(store.outbox(project), begin)
        record.add_metrics(1, {"loss": 0.5})
        record.close()
        paths.append(record.folder / NAME)
    paths[0].write_bytes(b"[]\n" + paths[0].read_bytes().splitlines(keepends=True)[1])
    with paths[1].open("a") as file:
        file.write('{"n": 3, "op": "told", "time": 1, "run_id": 5, "upto": -3}\n')
    with paths[2].open("a") as file:
        file.write('{"op": "metrics"}\n[]\n')
        file.write(json.dumps({"n": 3, "op": "metrics", "time": 1, "step": 2, "values": {"loss": 0.4}}) + "\n")
    with caplog.at_level(logging.WARNING, logger="vlv"):
        report = tracking.replay_all(project)
    assert (report.delivered, report.waiting) == (2, [])
    assert "record.jsonl.damaged" in caplog.text and "2 damaged lines are passed over" in caplog.text
    assert sorted(len(_steps(project, run)) for run in _runs(project, "damaged record")) == [1, 2]
