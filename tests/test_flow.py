"""The flow on a toy project: real Prefect server and worker, real DVC, real data, stages that cost nothing."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows import graph, tasks
from tests import projects
from vlv.config import ConfigError

_PATIENCE = 400.0  # seconds, for what takes a few on a quiet machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server of its own; yields the environment that leads there."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = projects.python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=projects.environment(**where, **quiet), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait(lambda: _get(where, "health") is not None, "the server")
            yield where
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def toy(tmp_path: Path, sprites: Path) -> Path:
    return projects.toy(tmp_path / "toy", sprites)


def _get(where: dict[str, str], path: str, body: object = None) -> object | None:
    """The answer of the server's API, or None while there is none."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{where['PREFECT_API_URL']}/{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except OSError:
        return None


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {_PATIENCE:.0f} s"
        time.sleep(0.5)


def _ids(project: Path) -> list[int]:
    """The process ids that the sleeping stage wrote; waits for them."""
    file = project / "pids"
    _wait(lambda: file.exists() and len(file.read_text().split()) == 2, "the sleeping stage")
    return [int(one) for one in file.read_text().split()]


def _gone(ids: list[int]) -> bool:
    return not any(psutil.pid_exists(one) and psutil.Process(one).status() != "zombie" for one in ids)


def _flow(project: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return projects.run(projects.python("-m", "flows.full_train", *arguments), project, **env)


def _outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the last lines say of each stage."""
    line = next(line for line in done.stdout.splitlines() if line.startswith("first: "))
    return dict(part.split(": ") for part in line.split("  "))


def test_the_order_is_read_from_dvc_yaml(toy: Path) -> None:
    assert graph.stages(toy) == ["first", "middle", "last"]
    assert graph.stages(toy, "middle") == ["first", "middle"]
    with pytest.raises(ConfigError, match=r"no stage 'stage9'.*last, first, middle"):
        graph.stages(toy, "stage9")


def test_the_repository_takes_care_of_stages_that_exist() -> None:
    assert graph.stages(projects.REPOSITORY) == ["validate", "stage1", "stage2", "evaluate", "register"]
    assert set(tasks.CARE) <= set(graph.stages(projects.REPOSITORY))


def test_no_infrastructure_only_what_is_stale(toy: Path) -> None:
    """The temporary server; everything runs, then nothing, then what a parameter touches."""
    first = _flow(toy)
    assert first.returncode == 0, first.stdout + first.stderr
    assert _outcomes(first) == {"first": "ran", "middle": "ran", "last": "ran"}
    assert "middle begins" in first.stdout + first.stderr  # the stage's own lines are in the log
    assert (toy / ".prefect").is_dir() and (toy / "data.dvc").exists()
    flow_runs = {(toy / "work" / name / "done.txt").read_text().split()[1] for name in ("first", "middle")}
    assert len(flow_runs) == 1  # both know the flow run that they belong to

    params = (toy / "params.yaml").read_text()
    (toy / "params.yaml").write_text(params.replace("\n  seed: 2\n", "\n  seed: 22\n"))
    projects.commit(toy, "seed of stage 2")
    second = _flow(toy, "--upto", "middle")
    assert _outcomes(second) == {"first": "current", "middle": "ran"}, second.stdout + second.stderr


def test_tampered_data_is_refused_before_any_stage(toy: Path, server: dict[str, str]) -> None:
    made = projects.run(projects.python("-m", "vlv", "data", "download"), toy)
    assert made.returncode == 0, made.stderr
    shard = toy / "data" / "test" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    pinned = (toy / "data.dvc").read_bytes()
    done = _flow(toy, **server)
    assert done.returncode == 1
    assert "test/00000.tar" in done.stderr and "vlv data download" in done.stderr
    assert not (toy / "work" / "first").exists()
    assert (toy / "data.dvc").read_bytes() == pinned


def test_a_failed_stage_stops_the_run_with_its_last_lines(toy: Path, server: dict[str, str]) -> None:
    done = _flow(toy, **server, TOY="fail")
    assert done.returncode == 1
    assert "no such luck" in done.stderr and "middle" in done.stderr
    assert not (toy / "work" / "last").exists()
    again = _flow(toy, **server)
    assert _outcomes(again) == {"first": "current", "middle": "ran", "last": "ran"}, again.stderr


def test_a_training_that_a_signal_ended_is_started_once_more(toy: Path, server: dict[str, str]) -> None:
    text = (toy / "dvc.yaml").read_text().replace("  middle:\n", "  stage2:\n")  # a name that has a retry
    (toy / "dvc.yaml").write_text(text)
    done = _flow(toy, **server, TOY="die-once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _outcomes(done)["stage2"] == "ran" and (toy / "died").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_flow_ends_its_children(toy: Path, server: dict[str, str], number: signal.Signals) -> None:
    process = subprocess.Popen(
        projects.python("-m", "flows.full_train"),
        cwd=toy,
        env=projects.environment(**server, TOY="sleep"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ids = _ids(toy)
        process.send_signal(number)
        _, errors = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], errors
    assert _gone(ids)
    # what DVC's lock file says of the dead does not keep the next run out
    assert _outcomes(_flow(toy, **server)) == {"first": "current", "middle": "ran", "last": "ran"}


def test_a_time_limit_ends_the_children(toy: Path, server: dict[str, str]) -> None:
    code = "from flows.full_train import full_train; full_train(timeouts={'middle': 20})"
    done = projects.run(projects.python("-c", code), toy, **server, TOY="sleep")
    assert done.returncode == 1
    assert "exceeded timeout" in done.stdout + done.stderr
    assert _gone(_ids(toy))


def test_deployment_server_pool_worker_run_and_cancel(toy: Path, server: dict[str, str]) -> None:
    """README's section "with a server", word by word; then a cancel from outside."""
    prefect = projects.python("-m", "prefect")
    pool = projects.run([*prefect, "work-pool", "create", "vlv", "--type", "process"], toy, **server)
    assert pool.returncode == 0, pool.stderr
    deployed = projects.run([*prefect, "--no-prompt", "deploy", "--all"], toy, **server)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    with (toy.parent / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [*prefect, "worker", "start", "--pool", "vlv"],
            cwd=toy,
            env=projects.environment(**server),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            watched = projects.run([*prefect, "deployment", "run", "vlv/full-train", "--watch"], toy, **server)
            assert watched.returncode == 0, watched.stdout + (toy.parent / "worker.log").read_text()
            assert (toy / "work" / "last" / "done.txt").exists()
            assert _artifact(server, "run") is not None

            (toy / "toy.py").write_text("import os; os.environ['TOY'] = 'sleep'\n" + (toy / "toy.py").read_text())
            started = projects.run([*prefect, "deployment", "run", "vlv/full-train"], toy, **server)
            assert started.returncode == 0, started.stdout
            ids = _ids(toy)
            running = _get(server, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}})
            assert isinstance(running, list) and len(running) == 1
            run_id = running[0]["id"]
            cancelled = projects.run([*prefect, "flow-run", "cancel", run_id], toy, **server)
            assert cancelled.returncode == 0, cancelled.stderr
            _wait(lambda: _gone(ids), "the end of the children")
            _wait(lambda: _state(server, run_id) == "CANCELLED", "the state Cancelled")
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(120)


def _artifact(where: dict[str, str], key: str) -> object | None:
    return _get(where, f"artifacts/{key}/latest")


def _state(where: dict[str, str], run_id: str) -> str:
    found = _get(where, f"flow_runs/{run_id}")
    return str(found["state_type"]) if isinstance(found, dict) else ""


def test_a_second_flow_in_the_same_folder_says_who_holds_it(toy: Path, server: dict[str, str]) -> None:
    from vlv import files

    with files.folder_lock(toy / "work", "the flow vlv"):
        done = _flow(toy, **server)
    assert done.returncode == 2
    assert f"process {os.getpid()} (the flow vlv)" in done.stderr.replace("\n", " ")
