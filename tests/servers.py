"""Real servers for the tests, each on a free port with its own folder; and functions that wait for processes."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import projects

PATIENCE = 400.0  # seconds, for what takes a few on a quiet machine


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE:.0f} s"
        time.sleep(0.5)


def stage_processes(project: Path) -> list[int]:
    """The process ids that the toy's sleeping stage wrote; waits for them."""
    file = project / "pids"
    wait(lambda: file.exists() and len(file.read_text().split()) == 2, "the sleeping stage")
    return [int(one) for one in file.read_text().split()]


def gone(ids: list[int]) -> bool:
    return not any(psutil.pid_exists(one) and psutil.Process(one).status() != "zombie" for one in ids)


def get(url: str, body: object = None) -> object | None:
    """The JSON that a server answers, or None while there is no answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: object = json.loads(answer.read() or b"null")
            return content
    except (OSError, ValueError):
        return None


@contextmanager
def prefect(home: Path) -> Iterator[dict[str, str]]:
    """Yields the environment that leads to the server."""
    port = free_port()
    where = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = projects.python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with _process(command, home, **where):
        wait(lambda: get(f"{where['PREFECT_API_URL']}/health") is True, "the Prefect server")
        yield where


@contextmanager
def mlflow(home: Path) -> Iterator[str]:
    """Yields the server's address."""
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")]
    command = projects.python("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    url = f"http://127.0.0.1:{port}"
    # Without its job runners: seven processes that no test needs.
    with _process([*command, *store], home, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        experiments = {"max_results": 1}
        wait(lambda: get(f"{url}/api/2.0/mlflow/experiments/search", experiments) is not None, "the MLflow server")
        yield url


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def _process(command: list[str], home: Path, **env: str) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=projects.environment(**env), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)
