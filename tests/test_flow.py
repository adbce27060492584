"""The flow on a toy project: real Prefect server and worker, real DVC, real data, stages that cost nothing."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from flows import dvc
from tests import projects, servers
from vlv import stages
from vlv.config import ConfigError


@pytest.fixture
def toy(ready_toy: Path, tmp_path: Path) -> Path:
    """A toy project whose data is there."""
    return Path(shutil.copytree(ready_toy, tmp_path / "toy", symlinks=True))


def _flow(project: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return projects.run(projects.python("-m", "flows.full_train", *arguments), project, **env)


def _outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the last lines say of each stage."""
    line = next(line for line in done.stdout.splitlines() if line.startswith("first: "))
    return dict(part.split(": ") for part in line.split("  "))


def test_the_order_is_read_from_dvc_yaml(toy: Path) -> None:
    assert dvc.stages(toy) == ["first", "middle", "last"]
    assert dvc.stages(toy, "middle") == ["first", "middle"]
    with pytest.raises(ConfigError, match=r"no stage 'stage9'.*last, first, middle"):
        dvc.stages(toy, "stage9")


def test_retry_policies_are_read_from_dvc_yaml(toy: Path) -> None:
    names = dvc.stages(projects.REPOSITORY)
    assert names == stages.NAMES
    policies = {name: dvc.retry_policy(projects.REPOSITORY, name) for name in names}
    assert {name for name in names if policies[name].retries and policies[name].retry_after == "signal"} == {
        "stage1", "stage2",
    }  # fmt: skip
    assert dvc.retry_policy(toy, "first") == dvc.RetryPolicy()
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace("toy.py first\n", "toy.py first\n    meta: {flow: {retrys: 1}}\n"))
    with pytest.raises(ConfigError, match=r"stages\.first\.meta\.flow: retrys"):
        dvc.retry_policy(toy, "first")


@pytest.mark.server
def test_without_infrastructure_only_stale_stages_run(tmp_path: Path, sprites: Path) -> None:
    """From nothing, with Prefect's temporary server: everything runs, then only what a parameter affects."""
    toy = projects.toy(tmp_path / "toy", sprites)
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


@pytest.mark.server
def test_tampered_data_is_refused_before_any_stage(toy: Path, prefect_server: dict[str, str]) -> None:
    shard = toy / "data" / "test" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    pinned = (toy / "data.dvc").read_bytes()
    done = _flow(toy, **prefect_server)
    assert done.returncode == 1
    assert "test/00000.tar" in done.stderr and "vlv data download" in done.stderr
    assert not (toy / "work" / "first").exists()
    assert (toy / "data.dvc").read_bytes() == pinned


@pytest.mark.server
def test_a_failed_stage_stops_the_run_with_its_last_lines(toy: Path, prefect_server: dict[str, str]) -> None:
    done = _flow(toy, **prefect_server, TOY="fail")
    assert done.returncode == 1
    assert "no such luck" in done.stderr and "middle" in done.stderr
    assert not (toy / "work" / "last").exists()
    again = _flow(toy, **prefect_server)
    assert _outcomes(again) == {"first": "current", "middle": "ran", "last": "ran"}, again.stderr


@pytest.mark.server
def test_a_training_ended_by_a_signal_is_retried_once(toy: Path, prefect_server: dict[str, str]) -> None:
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace("toy.py middle\n", "toy.py middle\n    meta: {flow: {retries: 1}}\n"))
    done = _flow(toy, **prefect_server, TOY="die-once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _outcomes(done)["middle"] == "ran" and (toy / "died").exists()


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_flow_ends_its_children(toy: Path, prefect_server: dict[str, str], number: signal.Signals) -> None:
    process = subprocess.Popen(
        projects.python("-m", "flows.full_train"),
        cwd=toy,
        env=projects.environment(**prefect_server, TOY="sleep"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ids = servers.stage_processes(toy)
        process.send_signal(number)
        _, errors = process.communicate(timeout=servers.PATIENCE)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], errors
    assert servers.gone(ids)
    # DVC's lock file still names the dead process, but does not block the next run. DVC runs the stages of a flow.
    again = projects.run(projects.python("-m", "dvc", "repro"), toy)
    assert again.returncode == 0, again.stderr
    assert "Stage 'first' didn't change" in again.stdout and "Running stage 'middle'" in again.stdout, again.stdout


@pytest.mark.server
def test_a_time_limit_ends_the_children(toy: Path, prefect_server: dict[str, str]) -> None:
    code = "from flows.full_train import full_train; full_train(timeouts={'middle': 20})"
    done = projects.run(projects.python("-c", code), toy, **prefect_server, TOY="sleep")
    assert done.returncode == 1
    assert "exceeded timeout" in done.stdout + done.stderr
    assert servers.gone(servers.stage_processes(toy))


@pytest.mark.server
def test_a_second_flow_in_the_same_folder_names_the_holder(toy: Path, prefect_server: dict[str, str]) -> None:
    from vlv.io import files

    with files.folder_lock(toy / "work", "the flow vlv"):
        done = _flow(toy, **prefect_server)
    assert done.returncode == 2
    assert f"process {os.getpid()} (the flow vlv)" in done.stderr.replace("\n", " ")
