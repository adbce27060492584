"""Tracking against a real MLflow: a sqlite file, and a server that is killed in mid-run."""

import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from vlv import registry, tracking
from vlv.config import Paths
from vlv.io import json_lines
from vlv.tracking import replay, run, store
from vlv.tracking.run_record import NAME, Begin, Pending, RunRecord

FAST = {"system_metrics": False, "interval": 0.2}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project with a sqlite file of its own, shared because making its tables takes seconds."""
    return Paths(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "VLV_PARENT_RUN_ID", "VLV_FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def find(paths: Paths, name: str) -> list[MlflowRun]:
    client = MlflowClient(tracking.tracking_uri(paths))
    experiment = client.get_experiment_by_name("vlv")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"run_name = '{name}'"))


def curve(paths: Paths, run_id: str, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking.tracking_uri(paths)).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def test_everything_arrives_nested(project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "report.md").write_text("# report")
    with tracking.start_run(project, "flow", tags={"vlv.flow_run_id": "f1"}, **FAST) as flow:
        parent = flow.wait_for_id()
        assert parent is not None
        monkeypatch.setenv(tracking.PARENT_VARIABLE, parent)  # as a flow hands it to the children that run its stages
        with tracking.start_run(project, "all", tags={"kind": "test"}, **FAST) as one:
            one.log_params({"optimizer": {"rate": 1e-3}, "long": "x" * 9000})
            one.log_metrics({"loss": 2.0}, 1)
            one.log_metrics({"loss": math.nan, "rate %": 1}, 2)
            one.log_metrics({"loss": 7.0}, 2)  # a second point at the same step
            one.log_dataset("scenes", "d" * 64, "data", {"train": 3})
            one.log_artifact(tmp_path / "model")
            one.set_tags({"quality": "good"})
            one.log_artifact(tmp_path / "report.md", to="reports")
            (tmp_path / "model").rename(tmp_path / "moved")  # what is logged is kept as it was
        flow.log_metrics({"exact": 0.9})

    (found,) = find(project, "all")
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.data.tags["quality"] == "good"
    assert found.data.params["optimizer.rate"] == "0.001"
    assert len(found.data.params["long"]) == 6000
    (first, second) = curve(project, found.info.run_id, "loss")
    assert first == (1, 2.0)
    assert math.isnan(second[1])
    assert curve(project, found.info.run_id, "rate _") == [(2, 1.0)]
    (dataset,) = found.inputs.dataset_inputs
    assert json.loads(dataset.dataset.profile) == {"digest": "d" * 64, "train": 3}
    client = MlflowClient(tracking.tracking_uri(project))
    assert [one.path for one in client.list_artifacts(found.info.run_id, "model")] == ["model/config.json"]
    assert [one.path for one in client.list_artifacts(found.info.run_id, "reports")] == ["reports/report.md"]
    ended = client.get_run(parent)
    assert (ended.info.status, ended.data.metrics) == ("FINISHED", {"exact": 0.9})
    assert list(store.outbox(project).iterdir()) == []


def test_an_entry_that_mlflow_refuses_does_not_block_the_others(project: Paths) -> None:
    with tracking.start_run(project, "refused", **FAST) as one:
        one.log_metrics({"a//b": 1.0}, 1)  # not a name that MLflow takes
        one.log_metrics({"fine": 1.0}, 1)
    (found,) = find(project, "refused")
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"fine": 1.0})
    (kept,) = store.outbox(project).glob("*/refused.jsonl")
    assert [row["entry"]["values"] for row in json_lines.read(kept) if row["op"] == "refused"] == [{"a//b": 1.0}]
    assert tracking.undelivered(project) == []


def test_the_run_of_a_failed_stage_is_failed(project: Paths) -> None:
    with pytest.raises(ZeroDivisionError), tracking.start_run(project, "failed", **FAST):
        _ = 1 / 0
    assert [one.info.status for one in find(project, "failed")] == ["FAILED"]


KILLED_TRAINER = """
import os, signal, sys, time
from pathlib import Path
from vlv import tracking
from vlv.config import Paths
with tracking.start_run(Paths(Path(sys.argv[1])), "killed", folder=Path(sys.argv[2]), interval=0.2) as run:
    run.log_params({"rate": 1})
    for step in range(30):
        run.log_metrics({"loss": step / 2}, step)
        if step == 20:
            run.wait_for_id()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _training(project: Paths, name: str) -> Path:
    """Where a training keeps its checkpoints, as vlv.stages.record does it."""
    return project.work / name / "training-0123456789ab"


def test_a_killed_trainer_continues_its_run(project: Paths) -> None:
    training = _training(project, "killed")
    child = subprocess.run([sys.executable, "-c", KILLED_TRAINER, str(project.root), str(training)])
    assert child.returncode == -signal.SIGKILL
    (record,) = training.glob(f"run-*/{NAME}")
    with record.open("a") as file:  # half a line, as a kill in the middle of a write leaves it
        file.write('{"op": "metr')
    assert tracking.undelivered(project) == [record.parent]  # that the run was killed, at least
    assert tracking.replay_all(project).waiting == []
    assert [one.info.status for one in find(project, "killed")] == ["KILLED"]
    with tracking.start_run(project, "killed", folder=training, **FAST) as resumed:
        resumed.log_params({"rate": 1})
        for step in range(25, 40):  # the steps since the last checkpoint are run again
            resumed.log_metrics({"loss": step / 2}, step)
        assert resumed.curve(["loss"]) == {step: {"loss": step / 2} for step in range(40)}
    (found,) = find(project, "killed")
    assert found.info.status == "FINISHED"
    assert curve(project, found.info.run_id, "loss") == [(step, step / 2) for step in range(40)]
    assert tracking.undelivered(project) == []
    tracking.keep_undelivered(project, training)  # nothing is undelivered, so nothing is kept
    assert not list(store.outbox(project).glob(f"*/{NAME}"))


def test_what_a_finished_training_could_not_deliver_outlives_its_folder(
    project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(_record: RunRecord) -> None:
        raise replay.Unreachable("no answer")

    training = _training(project, "kept")
    (tmp_path / "grid.png").write_bytes(b"picture")
    with monkeypatch.context() as patched:
        patched.setattr(replay, "replay", dead)
        patched.setattr(run, "LOCAL_CLOSE_SECONDS", 0.5)
        with tracking.start_run(project, "kept", folder=training, **FAST) as one:
            for step in range(3):
                one.log_metrics({"loss": float(step)}, step)
            one.log_artifact(tmp_path / "grid.png")
        tracking.keep_undelivered(project, training)
        tracking.keep_undelivered(project, training)  # as after a kill between the two
        shutil.rmtree(training)
    assert [folder.parent for folder in tracking.undelivered(project)] == [store.outbox(project)]
    assert tracking.replay_all(project).delivered == 1
    (found,) = find(project, "kept")
    assert found.info.status == "FINISHED"
    assert curve(project, found.info.run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    (picture,) = MlflowClient(tracking.tracking_uri(project)).list_artifacts(found.info.run_id)
    assert (picture.path, picture.file_size) == ("grid.png", 7)


@pytest.mark.parametrize("notes", [0, 1])
def test_a_killed_replay_loses_nothing_and_repeats_nothing(
    project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: int
) -> None:
    """MLflow has it, but the kill came before this was noted: after the run was made, after all of its entries."""
    (tmp_path / "grid.png").write_bytes(b"picture")
    folder = left_behind(project, f"cut {notes}", points=5, attached=tmp_path / "grid.png")
    told, left = RunRecord.told, iter(range(notes))

    def killed(record: RunRecord, run_id: str, entries: Sequence[Pending] = ()) -> bool:
        if next(left, None) is None:
            raise SystemExit
        return told(record, run_id, entries)

    record = RunRecord.open(folder)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(RunRecord, "told", killed)
        replay.replay(record)
    record.close()
    assert tracking.replay_all(project).delivered == 1
    (found,) = find(project, f"cut {notes}")
    assert found.info.status == "KILLED"
    assert curve(project, found.info.run_id, "loss") == [(step, float(step)) for step in range(5)]
    (picture,) = MlflowClient(tracking.tracking_uri(project)).list_artifacts(found.info.run_id)
    assert (picture.path, picture.file_size) == ("grid.png", 7)


def left_behind(paths: Paths, name: str, points: int, attached: Path | None = None) -> Path:
    """The record of a run whose process is gone; MLflow knows nothing of it."""
    uri = tracking.prepare(paths)
    begin = Begin(uri, "vlv", store.artifact_root(paths, uri), name, 1_700_000_000_000)
    record = RunRecord.create(store.outbox(paths), begin)
    for step in range(points):
        record.add_metrics(step, {"loss": float(step)})
    if attached:
        record.append("artifact", kept=record.attach(attached), to="")
    record.close()
    return record.folder


REPLAYS = """
import sys
from pathlib import Path
from vlv import tracking
from vlv.config import Paths
print(tracking.replay_all(Paths(Path(sys.argv[1]))).delivered)
"""


@pytest.mark.slow
def test_two_processes_that_replay_at_once_deliver_each_run_once(project: Paths) -> None:
    names = [f"twice {number}" for number in range(6)]
    for name in names:
        left_behind(project, name, points=200)
    command = [sys.executable, "-c", REPLAYS, str(project.root)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    delivered = [int(child.communicate(timeout=300)[0]) for child in children]
    assert sum(delivered) == len(names)
    for name in names:
        (found,) = find(project, name)
        assert curve(project, found.info.run_id, "loss") == [(step, float(step)) for step in range(200)]


def test_a_living_run_is_left_to_its_own_process(project: Paths) -> None:
    with tracking.start_run(project, "living", system_metrics=False, interval=60.0) as living:
        living.wait_for_id()
        living.log_metrics({"loss": 1.0}, 1)
        done = subprocess.run([sys.executable, "-c", REPLAYS, str(project.root)], capture_output=True, text=True)
        assert done.stdout.strip() == "0", done.stderr
        (found,) = find(project, "living")
        assert (found.info.status, found.data.metrics) == ("RUNNING", {})
    (found,) = find(project, "living")
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_a_run_that_is_gone_from_the_server_is_made_again(project: Paths) -> None:
    record = RunRecord.open(left_behind(project, "gone", points=3))
    record.told("0" * 32, record.pending())
    record.finish("FINISHED")
    record.close()
    assert tracking.replay_all(project).delivered == 1
    (found,) = find(project, "gone")
    assert curve(project, found.info.run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_run_that_continues_on_another_server_is_delivered_there_in_full(
    project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = _training(project, "moved")
    with pytest.raises(ZeroDivisionError), tracking.start_run(project, "moved", folder=training, **FAST) as first:
        first.log_metrics({"loss": 1.0}, 1)
        _ = 1 / 0
    assert [one.info.status for one in find(project, "moved")] == ["FAILED"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri(Paths(tmp_path)))
    with tracking.start_run(project, "moved", folder=training, **FAST) as second:
        second.log_metrics({"loss": 2.0}, 2)
    (moved,) = find(project, "moved")
    assert curve(project, moved.info.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_partial_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, Begin("sqlite:///x", "vlv", None, "one", 0))
    record.append("tags", values={"a": "1"})
    with (record.folder / NAME).open("a") as file:
        file.write('{"op": "tags", "val')
    record.close()
    opened = RunRecord.open(record.folder)
    opened.finish("KILLED")
    assert [one.entry["op"] for one in opened.pending()] == ["tags", "finish"]
    assert not opened.append("tags", values={"a": "2"}), "nothing is recorded after the end"


FIRST_USER = """
import sys
from pathlib import Path
from vlv import tracking
from vlv.config import Paths
with tracking.start_run(Paths(Path(sys.argv[1])), "first", interval=0.2) as run:
    run.log_metrics({"loss": 1.0}, 1)
"""


@pytest.mark.slow
def test_several_first_users_share_a_new_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_USER, str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait(300) for child in children] == [0, 0, 0]
    found = find(Paths(tmp_path), "first")
    assert [(one.info.status, one.data.metrics) for one in found] == [("FINISHED", {"loss": 1.0})] * 3


def test_no_password_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:s3c@ret@127.0.0.1:{port}")
    monkeypatch.setattr(run, "CLOSE_SECONDS", 5.0)
    paths = Paths(tmp_path)
    with caplog.at_level(logging.WARNING, logger="vlv"), tracking.start_run(paths, "secret", **FAST) as one:
        one.log_metrics({"loss": 1.0}, 1)
    reason = tracking.replay_all(paths).reason
    with pytest.raises(registry.RegistryError) as error:
        registry.list_models(paths)
    for said in (caplog.text, str(reason), str(error.value)):
        assert str(port) in said and "s3c" not in said and "somebody" not in said, said


class Server:
    """A real `mlflow server` on sqlite that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # not ours, and slow
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.server
@pytest.mark.timeout(1500)
def test_a_killed_server_costs_no_time_and_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, paths = Server(tmp_path), Paths(tmp_path / "project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(run, "CLOSE_SECONDS", 2.0)
    slowest = 0.0

    def log(one: tracking.Run, steps: range) -> None:
        nonlocal slowest
        for step in steps:
            began = time.monotonic()
            one.log_metrics({"loss": float(step)}, step)
            slowest = max(slowest, time.monotonic() - began)

    def released() -> list[Path]:
        for thread in threading.enumerate():
            if thread.name == "vlv-mlflow":  # it ends with the call that it is in
                thread.join(60)
        return tracking.undelivered(paths)

    try:
        with tracking.start_run(paths, "before", **FAST) as early:  # the server is not up yet
            log(early, range(5))
            assert early.run_id is None
        assert len(released()) == 1

        server.start()
        with tracking.start_run(paths, "during", **FAST) as late:
            assert late.wait_for_id(300)
            log(late, range(50))
            while len(curve(paths, late.run_id, "loss")) < 50:
                time.sleep(0.2)
            server.kill()
            log(late, range(50, 100))
            (tmp_path / "grid.png").write_bytes(b"picture")
            late.log_artifact(tmp_path / "grid.png")
        (waiting,) = released()
        report = tracking.replay_all(paths)
        assert report.waiting == [waiting]
        assert report.reason
        # The worst case: all of it was delivered, but the kill came before that was written down.
        lines = (waiting / NAME).read_text().splitlines(keepends=True)
        untold = [line for line in lines if '"op": "told"' not in line]
        assert len(lines) - len(untold) >= 2
        (waiting / NAME).write_text("".join(untold))

        server.start()
        assert tracking.replay_all(paths).delivered == 1
        assert tracking.replay_all(paths) == tracking.Replayed(0, [])
        for name, count in (("before", 5), ("during", 100)):
            (found,) = find(paths, name)
            assert found.info.status == "FINISHED"
            assert curve(paths, found.info.run_id, "loss") == [(step, float(step)) for step in range(count)]
        (picture,) = MlflowClient(server.uri).list_artifacts(found.info.run_id)
        assert (picture.path, picture.file_size) == ("grid.png", 7)
    finally:
        server.kill()
    assert slowest < 20  # MLflow's client waits for 247 s; here it is milliseconds
