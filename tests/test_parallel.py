"""Two processes (gloo) against one: the same samples, draws and losses; either goes on where the other stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import projects
from tests.conftest import ROOT
from tests.train_together import STEPS, train
from vlv import config, draws, files
from vlv.config import ConfigError, Timesteps
from vlv.models.decoder import draw_timesteps
from vlv.training import runtime, workers

LAUNCH = ROOT / "configs" / "accelerate"
TOLERANCE = 1e-5


def _together(plan: str, jobs: list[dict[str, Any]]) -> None:
    """Run trainings in as many processes as a shipped file says."""
    command = [sys.executable, "-m", "tests.train_together", json.dumps(jobs, default=str)]
    workers.run(command, LAUNCH / f"{plan}.yaml", ROOT, projects.environment(OMP_NUM_THREADS="1"))


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in files.read_json_lines(folder / "curve.jsonl")]


def _samples(folder: Path) -> dict[int, set[str]]:
    """Step -> the keys that any process took for it."""
    taken: dict[int, set[str]] = defaultdict(set)
    for path in folder.glob("samples-*.jsonl"):
        for row in files.read_json_lines(path):
            taken[row["step"]] |= set(row["keys"])
    return taken


def _same(folder: Path, reference: Path) -> None:
    assert len(_losses(folder)) == STEPS
    assert _losses(folder) == pytest.approx(_losses(reference), abs=TOLERANCE)
    assert _samples(folder) == _samples(reference)
    ours, theirs = files.read_json(folder / "trained.json"), files.read_json(reference / "trained.json")
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def data(_scene_data: Path) -> Path:
    return _scene_data


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in one process; and Stage 1 stopped there in its third step, for others to go on."""
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
def test_ddp_is_one_process(ddp: Path, alone: Path, stage: str) -> None:
    """With two micro-batches as well. Captions differ in length, so a mean of means would not be the mean."""
    _same(ddp / stage, alone / stage)


def test_more_processes_go_on_where_one_stopped(ddp: Path, alone: Path) -> None:
    assert not (alone / "stopped" / "trained.json").exists()
    _same(ddp / "from_one", alone / "stage1")


def test_one_process_goes_on_where_more_stopped(ddp: Path, alone: Path, data: Path, tmp_path: Path) -> None:
    """One of the two was told to stop; both saved and left at the end of that very step."""
    assert max(_samples(ddp / "stopped")) == 3
    _continue(ddp / "stopped", tmp_path / "from_two")
    train("stage1", data, tmp_path / "from_two")
    _same(tmp_path / "from_two", alone / "stage1")


def test_sharded_parameters_train_save_and_go_on_the_same(ddp: Path, alone: Path, data: Path, tmp_path: Path) -> None:
    """FSDP 2, with recomputed activations; the last one goes on from what DDP left."""
    _continue(ddp / "stopped", tmp_path / "from_ddp")
    _together("cpu-fsdp", [
        {"stage": "stage1", "data": data, "folder": tmp_path / "stage1", "gradient_checkpointing": True},
        {"stage": "stage2", "data": data, "folder": tmp_path / "stage2", "accumulation": 2},
        {"stage": "stage1", "data": data, "folder": tmp_path / "from_ddp"},
    ])  # fmt: skip
    _same(tmp_path / "stage1", alone / "stage1")
    _same(tmp_path / "stage2", alone / "stage2")
    _same(tmp_path / "from_ddp", alone / "stage1")


def test_draws_do_not_depend_on_who_draws() -> None:
    stratified = Timesteps(mode="stratified", high_noise_share=0.5)

    def drawn(part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = draws.PartGenerator(7, part, parts)
        count = 12 // parts
        first = draws.normal((count, 3, 5), generator)
        return first, draw_timesteps(stratified, count, 1000, generator), draws.normal((count, 2), generator)

    whole = drawn(0, 1)
    for parts in (2, 3, 6):
        pieces = [drawn(part, parts) for part in range(parts)]
        for i, tensor in enumerate(whole):
            assert torch.equal(torch.cat([piece[i] for piece in pieces]), tensor)
    plain = torch.Generator().manual_seed(7)
    assert torch.equal(torch.randn(12, 3, 5, generator=plain), whole[0]), "one process draws as it always did"


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    from tests.test_training import SETTINGS

    with pytest.raises(ConfigError, match="8 samples of a step cannot be shared evenly by 3 processes"):
        runtime.share(SETTINGS, SETTINGS.batch_size)


# -- processes ------------------------------------------------------------------------------------------

_WORKER = """
import os, sys, time
from vlv.config import ConfigError
from vlv.training import workers
with workers.reporting():
    if os.environ["RANK"] == "1":
        {fate}
    time.sleep(600)
"""


def _fail(fate: str) -> str:
    command = [sys.executable, "-c", _WORKER.format(fate=fate)]
    with pytest.raises(workers.WorkerError) as caught:
        workers.run(command, LAUNCH / "cpu-ddp.yaml", ROOT, projects.environment())
    assert not psutil.Process().children(), "a worker is left"
    return str(caught.value)


def test_the_error_of_one_process_is_the_error_of_all() -> None:
    assert _fail("raise ConfigError('no such luck')") == "Process 1 of 2 processes: no such luck"
    assert "ZeroDivisionError" in _fail("1 / 0")


def test_a_process_that_is_killed_is_named() -> None:
    message = _fail("print('last words', flush=True); os.kill(os.getpid(), 9)")
    assert message.startswith("Process 1 of 2 processes was killed by SIGKILL") and message.endswith("last words")


def test_processes_end_when_their_parent_is_killed() -> None:
    command = [sys.executable, "-c", _WORKER.format(fate="pass")]
    program = f"""
import os, pathlib
from vlv.training import workers
workers.run({command!r}, pathlib.Path({str(LAUNCH / "cpu-ddp.yaml")!r}), pathlib.Path({str(ROOT)!r}), dict(os.environ))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=projects.environment(), cwd=ROOT)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < deadline:
        children = psutil.Process(parent.pid).children()
        time.sleep(0.1)
    time.sleep(1.0)  # until they watch
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) == 2 and not alive


def test_a_process_that_never_comes_is_an_error_and_no_endless_wait() -> None:
    program = "from vlv.training import runtime; runtime.join(0.05)"
    alone_of_two = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(workers._free_port()), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = projects.run(projects.python("-c", program), ROOT, timeout=120, **alone_of_two)
    assert "MissingProcessError: Process 0 of 2 waited 0.05 minutes" in done.stderr, done.stderr


def test_plans_for_several_machines_or_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for 2 machines.*accelerate launch"):
        workers.read_plan(ROOT / "configs" / "cluster" / "ddp-2x8.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        workers.read_plan(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="MEGATRON_LM is not one of"):
        workers.plan_variables({"num_processes": 2, "distributed_type": "MEGATRON_LM"})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: p.name)
def test_accelerate_reads_the_shipped_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    assert read.num_processes % read.num_machines == 0
    if path.parent.name == "accelerate":
        assert workers.read_plan(path)["num_processes"] == read.num_processes
        workers.plan_variables(workers.read_plan(path))


def test_the_cluster_script_is_a_shell_script() -> None:
    script = ROOT / "configs" / "cluster" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_a_stage_starts_its_processes_stops_with_them_and_goes_on_alone(tmp_path: Path, sprites: Path) -> None:
    project = projects.smoke(tmp_path / "project", sprites)
    assert projects.run(projects.python("-m", "vlv", "data", "download"), project).returncode == 0
    params = (project / "params.yaml").read_text(encoding="utf-8")
    launched = f"{params}\ncompute: {{launch: configs/accelerate/cpu-ddp.yaml}}\n"
    files.write_text(project / "params.yaml", launched)
    stage = subprocess.Popen(
        projects.python("-m", "vlv", "run", "stage1"), cwd=project, env=projects.environment(OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not _rows(project) and stage.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(stage.pid).children(recursive=True)
    stage.send_signal(signal.SIGTERM)
    said = stage.communicate(timeout=60)[1]
    assert stage.returncode == 143 and "stopped and saved at step" in said, said
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=5)[1]
    files.write_text(project / "params.yaml", params)
    done = projects.run(projects.python("-m", "vlv", "run", "stage1"), project)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    figures = files.read_json(project / "metrics" / "stage1.json")
    smoke = config.load(config.Paths(project)).stage1
    assert figures["cost"]["sessions"] == 2 and figures["cost"]["flops"] > 0 and figures["cost"]["money"] is None
    assert figures["cost"]["samples"] == smoke.steps * smoke.batch_size, "no step was lost, none done twice"


def _rows(project: Path) -> list[Any]:
    curves = list((project / "work" / "stage1").glob("training-*/curve.jsonl"))
    return files.read_json_lines(curves[0]) if curves else []
