"""The processes of one training on one machine: started, watched, and gone when it ends.

The stage's own process starts them, each running the same stage, and waits. What an accelerate configuration
file says is handed on in the environment, as `accelerate launch` does; that command itself starts no processes
on CPUs, and its report of a failure buries the cause. Several machines: `accelerate launch` on each (docs/train.md).
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from vlv.config import ConfigError
from vlv.io import files
from vlv.io.stopping import Stopped, end_with

log = logging.getLogger(__name__)

_GRACE_SECONDS = 20.0  # to leave after another worker died; it may be stuck in a collective
_ORPHAN_SECONDS = 30.0  # to save after the parent died
_TAIL_LINES = 15
_MOST_PROCESSES = 1024  # on one machine
_REPORTS, _PARENT = "VLV_WORKER_REPORTS", "VLV_WORKER_PARENT"


class WorkerError(RuntimeError):
    """One of the processes failed; the message says which and why."""


def inside() -> bool:
    """Whether this process is one of several already, started by `run` or by `accelerate launch`."""
    return "LOCAL_RANK" in os.environ


def run(command: list[str], launch: Path, root: Path, environment: dict[str, str]) -> None:
    """Run `command` in as many processes as the accelerate file `launch` says; returns when all have ended well.

    SIGTERM and Ctrl-C are passed on, so that the processes save; a second Ctrl-C kills them. Only the main
    process writes to this one's output.

    Raises:
        ConfigError: no such file, or one that does not suit one machine.
        WorkerError: a process failed or died; the others were ended.
        Stopped: they were asked to stop, and saved.
    """
    plan = read_plan(launch)
    count: int = plan["num_processes"]
    with tempfile.TemporaryDirectory(prefix="vlv-workers-") as temporary:
        reports = Path(temporary)
        shared = {**environment, **plan_variables(plan), _REPORTS: str(reports), _PARENT: str(os.getpid())}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "VLV_ROOT": str(root)}
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with (reports / f"{rank}.log").open("wb") as output:
                    said = None if rank == 0 else output
                    processes.append(
                        subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
                    )
            failed = _watch(processes)
        finally:
            _end(processes)
        if failed:
            _explain(failed, processes, reports)


def read_plan(launch: Path) -> dict[str, Any]:
    """An accelerate configuration file, checked for what is used here.

    Raises:
        ConfigError: it is missing, no YAML, or for several machines.
    """
    try:
        plan = files.read_yaml_mapping(launch, "See configs/accelerate for files that do.")
    except files.FileError as error:
        raise ConfigError(f"compute.launch: {error}") from error
    count = plan.get("num_processes")
    if not isinstance(count, int) or not 1 <= count <= _MOST_PROCESSES:
        raise ConfigError(
            f"{launch} names no num_processes from 1 to {_MOST_PROCESSES}; see configs/accelerate for files that do"
        )
    for section in ("fsdp_config", "deepspeed_config"):
        if not isinstance(plan.get(section, {}), dict):
            raise ConfigError(f"{launch}: {section} holds no keys and values; see configs/accelerate for files that do")
    if plan.get("num_machines", 1) != 1:
        raise ConfigError(
            f"{launch} is for {plan['num_machines']} machines. Leave compute.launch empty and start the stage on each "
            f"of them with: accelerate launch --config_file {launch} --machine_rank N -m vlv run STAGE"
        )
    return plan


def plan_variables(plan: dict[str, Any]) -> dict[str, str]:
    """What accelerate reads in a worker's environment, for a plan of DDP, FSDP 2 or DeepSpeed."""

    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    kind = str(plan.get("distributed_type", "NO"))
    variables = {"ACCELERATE_USE_CPU": text(bool(plan.get("use_cpu", False)))}
    if kind == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        variables |= {key.upper(): text(value) for key, value in plan.get("fsdp_config", {}).items()}
    elif kind == "DEEPSPEED":
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        given: dict[str, Any] = plan.get("deepspeed_config", {})
        variables |= {f"ACCELERATE_DEEPSPEED_{key.upper()}": text(value) for key, value in given.items()}
    elif kind not in {"NO", "MULTI_GPU", "MULTI_CPU"}:
        raise ConfigError(f"distributed_type {kind} is not one of MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED")
    return variables


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _watch(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; the ranks that did not end well, in the order in which they were seen to end."""
    asked: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        kill = signal.SIGKILL if number == signal.SIGINT and asked else signal.SIGTERM
        asked.append(number)
        for process in processes:
            process.send_signal(kill)  # does nothing to one that has ended

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    failed: list[int] = []
    deadline: float | None = None
    try:
        while any(process.poll() is None for process in processes):
            failed += [r for r, p in enumerate(processes) if p.poll() not in (None, 0) and r not in failed]
            if failed and not asked and deadline is None:
                deadline = time.monotonic() + _GRACE_SECONDS
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed + [r for r, p in enumerate(processes) if p.poll() not in (None, 0) and r not in failed]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _explain(failed: list[int], processes: list[subprocess.Popen[bytes]], reports: Path) -> None:
    """Raise the error that came first; what other processes met was mostly that one's silence."""
    told = {one["rank"]: one for one in map(files.read_json, reports.glob("*.json"))}
    codes = {rank: processes[rank].returncode for rank in failed}
    stopped = {r for r in failed if (told[r]["stopped"] if r in told else codes[r] == -signal.SIGTERM)}
    if stopped == set(failed):
        said = [told[rank]["message"] for rank in sorted(stopped & told.keys())]
        raise Stopped(said[0] if said else "stopped before it trained; run it again.")
    which = f"of {len(processes)} processes"
    if killed := [rank for rank in failed if rank not in told and codes[rank] < 0 and rank not in stopped]:
        raise WorkerError(
            f"Process {killed[0]} {which} was killed by {signal.Signals(-codes[killed[0]]).name} (out of memory, or by "
            f"hand); the others were ended. Run it again to go on from the last checkpoint.{_tail(reports, killed[0])}"
        )
    if errors := [one for rank, one in told.items() if rank not in stopped]:
        first = min(errors, key=lambda one: float(one["time"]))
        raise WorkerError(f"Process {first['rank']} {which}: {first['message']}")
    raise WorkerError(f"Process {failed[0]} {which} ended without a reason.{_tail(reports, failed[0])}")


def _tail(reports: Path, rank: int) -> str:
    path = reports / f"{rank}.log"
    said = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n" + "\n".join(said) if said else ""


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Around the work of one process: it tells the parent its error, and ends when the parent has died.

    Does nothing in a process that `run` did not start, except that all but the main one say warnings only.
    """
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("vlv").setLevel(logging.WARNING)
    reports = os.environ.get(_REPORTS)
    if reports is None:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers to the terminal
    with contextlib.suppress(psutil.NoSuchProcess):  # it went before this process was up: the pipes break
        end_with(psutil.Process(int(os.environ[_PARENT])), _ORPHAN_SECONDS)
    try:
        yield
    except SystemExit:
        _report(Path(reports), "stopped before it trained; run it again.", stopped=True)
        raise
    except Exception as error:
        known = type(error).__module__.partition(".")[0] == "vlv"
        message = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
        stopped = isinstance(error, Stopped)
        _report(Path(reports), message, stopped=stopped)
        # The parent says it; said here as well it would be read once for each process.
        raise SystemExit(128 + signal.SIGTERM if stopped else 1) from None


def _report(folder: Path, message: str, *, stopped: bool) -> None:
    rank = int(os.environ["RANK"])
    report = {"rank": rank, "time": time.time(), "stopped": stopped, "message": message}
    with contextlib.suppress(OSError):  # the parent has gone, and its folder with it
        (folder / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
