"""A stage that DVC started ends with DVC, however DVC ends and whatever shell is between them."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import projects, servers

_SLEEPER = """
import os, pathlib, signal, sys, time
from vlv.io import stopping

def saved(number, frame):
    pathlib.Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, saved)
stopping.end_with_dvc()
pathlib.Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("command", ["python sleeper.py", "python sleeper.py; true"], ids=["alone", "shell between"])
def test_a_stage_saves_and_ends_when_dvc_is_killed(tmp_path: Path, number: signal.Signals, command: str) -> None:
    project = projects.bare(tmp_path / "project")
    (project / "sleeper.py").write_text(_SLEEPER)
    (project / "dvc.yaml").write_text(f"stages:\n  sleep:\n    cmd: {command}\n    deps: [sleeper.py]\n")
    env = projects.environment(SHELL="/bin/bash", PYTHONPATH=str(projects.REPOSITORY))
    dvc = subprocess.Popen(
        projects.python("-m", "dvc", "repro"),
        cwd=project,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ids = servers.stage_processes(project)
    dvc.send_signal(number)
    dvc.wait(30)
    servers.wait(lambda: servers.gone(ids[:1]), "the end of the stage")
    assert (project / "saved").exists()


def test_a_stage_that_dvc_did_not_start_continues_without_its_parent(tmp_path: Path) -> None:
    """`vlv run stage1 &` in a terminal that is closed, or under nohup."""
    (tmp_path / "sleeper.py").write_text(_SLEEPER)
    env = projects.environment(PYTHONPATH=str(projects.REPOSITORY))
    subprocess.run(["bash", "-c", "python sleeper.py & exit 0"], cwd=tmp_path, env=env, check=True)
    (stage, _) = servers.stage_processes(tmp_path)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(["tail", f"--pid={stage}", "-f", "/dev/null"], timeout=2, check=False)
        assert not servers.gone([stage]) and not (tmp_path / "saved").exists()
    finally:
        os.kill(stage, signal.SIGKILL)


def test_sigterm_exits_with_143(tmp_path: Path) -> None:
    code = "import signal, time\nfrom vlv.io import stopping\nsignal.signal(signal.SIGTERM, stopping.terminated)\n"
    code += "print('ready', flush=True)\ntime.sleep(600)\n"
    process = subprocess.Popen(projects.python("-c", code), stdout=subprocess.PIPE, cwd=projects.REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(30) == 143
    process.stdout.close()
