"""Starts, watches and ends the processes of one training on one machine.

The stage's own process starts them, each running the same stage, and waits. The settings of an accelerate file are
passed on in environment variables, as `accelerate launch` does. Several machines are started with `accelerate launch`
on each of them (docs/train.md).

No library's launcher is used. accelerate's starts no processes on CPUs. torch's (`torch.distributed.elastic`) records
errors by whole seconds, which hides the first one; it kills processes that are still saving 30 seconds after another
one has left; and it starts new sessions, which a kill of this process group does not reach.
"""

import contextlib
import json
import logging
import math
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

_GRACE_SECONDS = 20.0  # for the others to leave after one has failed; they may wait for it in a collective
_ORPHAN_SECONDS = 30.0  # to save after the parent died
_TAIL_LINES = 15
_MAX_PROCESSES = 1024  # on one machine
_REPORTS, _PARENT = "VLV_WORKER_REPORTS", "VLV_WORKER_PARENT"
_STOPPED_EARLY = "stopped before it trained; run it again."
_EXAMPLES = "see configs/accelerate for files that do"

Process = subprocess.Popen[bytes]


class WorkerError(RuntimeError):
    """One of the processes failed; the message says which one and why."""


def inside() -> bool:
    """Whether this process is one of several already, started by `run` or by `accelerate launch`."""
    return "LOCAL_RANK" in os.environ


def run(command: list[str], launch_file: Path, root: Path, environment: dict[str, str]) -> None:
    """Run `command` in as many processes as the accelerate file says; returns when all have succeeded.

    SIGTERM and Ctrl-C are passed on, so that the processes save. A second Ctrl-C kills them. Only the main process
    (rank 0) shares the output of this one.

    Args:
        root: the project folder of the processes.
        environment: all their other environment variables.

    Raises:
        ConfigError: the file is missing, or not for one machine.
        WorkerError: a process failed or was killed. The others were ended.
        Stopped: the processes were asked to stop, and saved.
    """
    settings = read_launch_file(launch_file)
    count: int = settings["num_processes"]
    processes: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="vlv-workers-") as reports:
        shared = environment | accelerate_variables(settings)
        shared |= {_REPORTS: reports, _PARENT: str(os.getpid()), "VLV_ROOT": str(root)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        try:
            for rank in range(count):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with Path(reports, f"{rank}.log").open("wb") as log:
                    said = None if rank == 0 else log
                    processes.append(
                        subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
                    )
            failed = _watch(processes)
        finally:
            for process in processes:
                process.kill()  # does nothing to one that has ended
                process.wait()
        if failed:
            raise _error(failed, [process.returncode for process in processes], Path(reports))


def read_launch_file(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration file and check the values that are used here.

    Raises:
        ConfigError: it is missing, not YAML, or for several machines.
    """
    try:
        settings = files.read_yaml_mapping(path, _EXAMPLES.capitalize() + ".")
    except files.FileError as error:
        raise ConfigError(f"compute.launch: {error}") from error
    count = settings.get("num_processes")
    if not isinstance(count, int) or not 1 <= count <= _MAX_PROCESSES:
        raise ConfigError(f"{path} has no num_processes from 1 to {_MAX_PROCESSES}; {_EXAMPLES}")
    if not isinstance(settings.get("fsdp_config", {}), dict):
        raise ConfigError(f"{path}: fsdp_config does not hold keys and values; {_EXAMPLES}")
    if settings.get("num_machines", 1) != 1:
        raise ConfigError(
            f"{path} is for {settings['num_machines']} machines. Leave compute.launch empty and start the stage on "
            f"each of them with: accelerate launch --config_file {path} --machine_rank N -m vlv run STAGE"
        )
    return settings


def accelerate_variables(settings: dict[str, Any]) -> dict[str, str]:
    """The environment variables in which accelerate expects the settings of an accelerate file.

    Raises:
        ConfigError: another distributed_type than DDP (MULTI_GPU, MULTI_CPU) and FSDP.
    """

    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    kind = str(settings.get("distributed_type", "NO"))
    variables = {"ACCELERATE_USE_CPU": text(bool(settings.get("use_cpu", False)))}
    if kind == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        variables |= {key.upper(): text(value) for key, value in settings.get("fsdp_config", {}).items()}
    elif kind not in {"NO", "MULTI_GPU", "MULTI_CPU"}:
        raise ConfigError(f"distributed_type {kind} is not one of MULTI_GPU, MULTI_CPU, FSDP")
    return variables


def free_port() -> int:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _watch(processes: list[Process]) -> list[int]:
    """Wait for all processes and pass signals on to them; returns the ranks that failed, the first failure first."""
    asked: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        kill = number == signal.SIGINT and asked
        asked.append(number)
        for process in processes:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    failed: list[int] = []
    running, deadline = True, math.inf
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
            failed += [rank for rank, code in enumerate(codes) if code and rank not in failed]
            running = None in codes
            if failed and not asked and deadline == math.inf:
                deadline = time.monotonic() + _GRACE_SECONDS
                for process in processes:
                    process.terminate()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed


def _error(failed: list[int], codes: list[int], reports: Path) -> WorkerError | Stopped:
    """The first error of the processes. Later ones are mostly consequences of it."""
    told = {report["rank"]: report for report in map(files.read_json, reports.glob("*.json"))}
    stopped = {rank for rank in failed if (told[rank]["stopped"] if rank in told else codes[rank] == -signal.SIGTERM)}
    if stopped == set(failed):
        said = [told[rank]["message"] for rank in sorted(stopped & told.keys())]
        return Stopped(said[0] if said else _STOPPED_EARLY)
    of_all = f"of {len(codes)} processes"
    if silent := [rank for rank in failed if rank not in told and rank not in stopped]:
        rank, code = silent[0], codes[silent[0]]
        killed = "was killed by {} (by the kernel when memory ran out, or by hand)"
        how = killed.format(signal.Signals(-code).name) if code < 0 else f"ended with exit code {code}"
        log = (reports / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        message = (
            f"Process {rank} {of_all} {how}; the others were ended. Run it again to resume from the last checkpoint."
        )
        return WorkerError("\n".join([message, *log[-_TAIL_LINES:]]))
    first = min((one for rank, one in told.items() if rank not in stopped), key=lambda one: float(one["time"]))
    return WorkerError(f"Process {first['rank']} {of_all}: {first['message']}")


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Around the work of one process: report its error to the parent, and end when the parent has died.

    In a process that `run` did not start, this only limits the log of all but the main process to warnings.
    """
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("vlv").setLevel(logging.WARNING)
    if _REPORTS not in os.environ:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers to the terminal
    try:
        end_with(psutil.Process(int(os.environ[_PARENT])), _ORPHAN_SECONDS)
    except psutil.NoSuchProcess:  # the parent died before this process was up
        raise SystemExit(128 + signal.SIGTERM) from None
    try:
        yield
    except SystemExit:
        _report(_STOPPED_EARLY, stopped=True)
        raise
    except Exception as error:
        known = type(error).__module__.partition(".")[0] == "vlv"
        stopped = isinstance(error, Stopped)
        _report(str(error) if known else "".join(traceback.format_exception(error)).rstrip(), stopped=stopped)
        # The parent shows the error. Shown here too, it would appear once for each process.
        raise SystemExit(128 + signal.SIGTERM if stopped else 1) from None


def _report(message: str, *, stopped: bool) -> None:
    rank = int(os.environ["RANK"])
    report = {"rank": rank, "time": time.time(), "stopped": stopped, "message": message}
    with contextlib.suppress(OSError):  # the parent died, and its folder is gone
        Path(os.environ[_REPORTS], f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
