"""Throw-away project folders: real git, real DVC, real configuration, in a temporary place."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from vlv.io import telemetry
from vlv.tracking import run_record

REPOSITORY = Path(__file__).resolve().parents[1]

# Three stages that take no time, in the wrong order on purpose. `middle` writes its process ids and
# misbehaves as TOY says.
_GRAPH = """
stages:
  last:
    cmd: python toy.py last
    deps: [work/middle, toy.py]
    outs: [work/last]
  first:
    cmd: python toy.py first
    deps: [data, toy.py]
    params: [stage1.seed]
    outs: [work/first]
  middle:
    cmd: python toy.py middle
    deps: [work/first, toy.py]
    params: [stage2.seed]
    outs:
      - work/middle: {persist: true}
"""

_STAGE = """
import os, pathlib, signal, subprocess, sys, time

name = sys.argv[1]
mode = os.environ.get("TOY", "") if name == "middle" else ""
out = pathlib.Path("work", name)
out.mkdir(parents=True, exist_ok=True)
print(f"{name} begins", flush=True)
if mode == "sleep":  # a trainer with a loader of its own, in a session of its own
    loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path("pids").write_text(f"{os.getpid()} {loader.pid}")
    time.sleep(600)
if mode == "die-once" and not pathlib.Path("died").exists():
    pathlib.Path("died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "fail":
    sys.exit("ERROR of the toy: no such luck")
(out / "done.txt").write_text(f"{name} {os.environ.get('VLV_FLOW_RUN_ID', '')}\\n")
"""


def run(command: list[str], cwd: Path, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in a project; its output is captured."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**env), text=True, capture_output=True, timeout=timeout, check=False
    )


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This environment with its programs first in PATH, without what a surrounding run may have set."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "VLV_", "MLFLOW"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return {**clean, **telemetry.SWITCHES, "PATH": path, **more}


def bare(folder: Path) -> Path:
    """A git and DVC project with the repository's own settings for both, and its flows and deployments."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (".dvcignore", ".gitignore", "prefect.toml", "prefect.yaml"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    shutil.copytree(REPOSITORY / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(REPOSITORY / ".dvc" / name, folder / ".dvc" / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    for key, value in (("user.name", "test"), ("user.email", "test@example.org")):
        subprocess.run(["git", "config", key, value], cwd=folder, check=True)
    return folder


def toy(folder: Path, sprites: Path) -> Path:
    """A project with the real configuration and real (few) scenes, and three toy stages."""
    bare(folder)
    settings = yaml.safe_load((REPOSITORY / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    settings["data"]["source"] |= {"train": 24, "validation": 4, "test": 8, "sprites": str(sprites)}
    settings["data"]["shard_size"] = 8
    settings["evaluate"] |= {"feature_network": None, "sentence_model": None, "captions": 8, "reconstructions": 8}
    settings["register"]["promote"] = False
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "dvc.yaml").write_text(_GRAPH, encoding="utf-8")
    (folder / "toy.py").write_text(_STAGE, encoding="utf-8")
    commit(folder, "toy")
    return folder


def prepare(folder: Path) -> Path:
    """Make a project's data and pin it, and make the tables of its tracking store; commit."""
    tables = "from vlv import tracking; from vlv.config import Paths; tracking.prepare(Paths.find())"
    for command in (("-m", "vlv", "data", "download"), ("-c", tables)):
        done = run(python(*command), folder)
        assert done.returncode == 0, done.stderr
    commit(folder, "data")
    return folder


def commit(folder: Path, message: str) -> None:
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "--quiet", "--allow-empty", "-m", message], cwd=folder, check=True)


def smoke(folder: Path, sprites: Path) -> Path:
    """The repository itself with the smoke profile: its graph, its library, its pretrained parts."""
    bare(folder)
    for name in ("vlv", "pretrained"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "mlflow", folder / "mlflow", ignore=shutil.ignore_patterns("store"))
    shutil.copy(REPOSITORY / "dvc.yaml", folder / "dvc.yaml")
    profile = folder / "configs" / "smoke.yaml"
    text = re.sub(r"sprites: \S+", f"sprites: {sprites}", profile.read_text(encoding="utf-8"))
    profile.write_text(text, encoding="utf-8")
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    commit(folder, "smoke")
    return folder


def group_members(group: int) -> list[int]:
    """The processes of a process group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal to all processes of the group that `process` leads."""
    os.killpg(process.pid, number)


def kill_after(project: Path, stage: str, lines: int, seconds: float = 0.0) -> bool:
    """Start the stage and kill -9 it once its curve has so many lines, `seconds` later; False if it was too fast."""
    process = subprocess.Popen(
        python("-m", "vlv", "run", stage), cwd=project, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        if len(curve(project, stage)) >= lines:
            time.sleep(seconds)
            process.kill()
            return process.wait() == -signal.SIGKILL
        time.sleep(0.005)
    return False


def curve(project: Path, stage: str) -> list[int]:
    """The steps of the curve that an unfinished training has recorded so far."""
    records = list((project / "work" / stage).glob(f"training-*/run-*/{run_record.NAME}"))
    return list(run_record.curve(run_record.read(records[0]), ["loss"])) if records else []
