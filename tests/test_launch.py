"""The processes of one training: the stage starts them, they end together, and their first error is shown once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import projects
from tests.conftest import ROOT
from vlv import config
from vlv.config import ConfigError
from vlv.io import files
from vlv.training import launch

LAUNCH = ROOT / "configs" / "accelerate"

_WORKER = """
import os, sys, time
from vlv.config import ConfigError
from vlv.training import launch
with launch.reporting():
    if os.environ["RANK"] == "1":
        {fate}
    time.sleep(600)
"""


def _fail(fate: str) -> str:
    command = [sys.executable, "-c", _WORKER.format(fate=fate)]
    before = psutil.Process().children()  # other tests may have left some
    with pytest.raises(launch.WorkerError) as caught:
        launch.run(command, LAUNCH / "cpu-ddp.yaml", ROOT, projects.environment())
    assert set(psutil.Process().children()) <= set(before), "a worker is left"
    return str(caught.value)


def test_the_error_of_one_process_is_the_error_of_all() -> None:
    assert _fail("raise ConfigError('no such luck')") == "Process 1 of 2 processes: no such luck"
    assert "ZeroDivisionError" in _fail("1 / 0")


def test_a_process_that_is_killed_is_named() -> None:
    message = _fail("print('last words', flush=True); os.kill(os.getpid(), 9)")
    assert message.startswith("Process 1 of 2 processes was killed by SIGKILL") and message.endswith("last words")


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["before they are up", "while they work"])
def test_processes_end_when_their_parent_is_killed(seconds: float) -> None:
    command = [sys.executable, "-c", _WORKER.format(fate="pass")]
    program = f"""
import os, pathlib
from vlv.training import launch
launch.run({command!r}, pathlib.Path({str(LAUNCH / "cpu-ddp.yaml")!r}), pathlib.Path({str(ROOT)!r}), dict(os.environ))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=projects.environment(), cwd=ROOT)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < deadline:
        children = psutil.Process(parent.pid).children()
        time.sleep(0.1)
    time.sleep(seconds)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) == 2 and not alive


@pytest.mark.slow
def test_a_missing_process_ends_the_wait_with_an_error() -> None:
    program = "from vlv.training import distributed; distributed.join(0.05)"
    alone_of_two = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch.free_port()), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = projects.run(projects.python("-c", program), ROOT, timeout=120, **alone_of_two)
    assert "MissingProcessError: Process 0 of 2 waited 0.05 minutes" in done.stderr, done.stderr


def test_files_for_several_machines_or_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for 2 machines.*accelerate launch"):
        launch.read_launch_file(ROOT / "configs" / "cluster" / "ddp-2x8.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        launch.read_launch_file(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="MEGATRON_LM is not one of"):
        launch.accelerate_variables({"num_processes": 2, "distributed_type": "MEGATRON_LM"})


_FILES = sorted(p for name in ("accelerate", "cluster") for p in (ROOT / "configs" / name).glob("*.yaml"))


def test_accelerate_reads_the_shipped_files() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in _FILES:
        read = load_config_from_file(str(path))
        assert read.num_processes % read.num_machines == 0, path
        if path.parent.name == "accelerate":
            assert launch.read_launch_file(path)["num_processes"] == read.num_processes, path
            launch.accelerate_variables(launch.read_launch_file(path))


def test_the_cluster_script_is_a_shell_script() -> None:
    script = ROOT / "configs" / "cluster" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_the_kubernetes_template_names_every_variable_it_uses() -> None:
    template = files.read_json(ROOT / "configs" / "kubernetes" / "job-template.json")
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.training
def test_a_stage_starts_its_processes_stops_with_them_and_resumes_alone(smoke: Path) -> None:
    project = smoke
    params = (project / "params.yaml").read_text(encoding="utf-8")
    launched = f"{params}\ncompute: {{launch: configs/accelerate/cpu-ddp.yaml}}\n"
    files.write_text(project / "params.yaml", launched)
    stage = subprocess.Popen(
        projects.python("-m", "vlv", "run", "stage1"), cwd=project, env=projects.environment(OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not projects.curve(project, "stage1") and stage.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(stage.pid).children(recursive=True)
    stage.send_signal(signal.SIGTERM)
    said = stage.communicate(timeout=60)[1]
    assert stage.returncode == 143 and "stopped and saved at step" in said, said
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=5)[1]
    files.write_text(project / "params.yaml", params)
    done = projects.run(projects.python("-m", "vlv", "run", "stage1"), project)
    assert done.returncode == 0 and "resuming from step" in done.stderr, done.stderr
    figures = files.read_json(project / "metrics" / "stage1.json")
    smoke = config.load(config.Paths(project)).stage1
    assert figures["cost"]["sessions"] == 2 and figures["cost"]["flops"] > 0 and figures["cost"]["money"] is None
    assert figures["cost"]["samples"] == smoke.steps * smoke.batch_size, "no step was lost, none done twice"
