"""Real servers for the tests, on free ports with their files in a folder each; and waiting for processes."""

import json
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from tests import projects
from vlv import files

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
    port = _free_port()
    where = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = projects.python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with _process(command, home, **where, PREFECT_SERVER_ANALYTICS_ENABLED="false"):
        wait(lambda: get(f"{where['PREFECT_API_URL']}/health") is True, "the Prefect server")
        yield where


@contextmanager
def mlflow(home: Path) -> Iterator[str]:
    """Yields the server's address."""
    port = _free_port()
    store = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")]
    command = projects.python("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    url = f"http://127.0.0.1:{port}"
    with _process([*command, *store], home, MLFLOW_DISABLE_TELEMETRY="true"):
        experiments = {"max_results": 1}
        wait(lambda: get(f"{url}/api/2.0/mlflow/experiments/search", experiments) is not None, "the MLflow server")
        yield url


def _free_port() -> int:
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


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub's HTTP interface that a download asks for; files from `folder`/OWNER/NAME."""

    folder: Path
    served: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = [part for part in urllib.parse.urlsplit(self.path).path.split("/") if part]
        if parts[0] == "api":
            repository, rest = self.folder.joinpath(*parts[2:4]), parts[4:]
        else:
            repository, rest = self.folder.joinpath(*parts[:2]), parts[2:]
        headers = {"X-Repo-Commit": self.commit}
        if not repository.is_dir():
            return self._send(404, b"{}", headers | {"X-Error-Code": "RepoNotFound"}, body)
        if rest[0] == "resolve":
            file = repository.joinpath(*rest[2:])
            content = file.read_bytes()
            if body:
                self.served.append(file.relative_to(repository).as_posix())
            return self._send(200, content, headers | {"ETag": f'"{files.sha256_bytes(content)}"'}, body)
        listed = [path for path in sorted(repository.rglob("*")) if path.is_file()]
        tree = [
            {"type": "file", "path": path.relative_to(repository).as_posix(), "size": path.stat().st_size, "oid": "0"}
            for path in listed
        ]
        answer: object = tree if rest[0] == "tree" else {"id": "/".join(parts[2:4]), "sha": self.commit, "siblings": []}
        return self._send(200, json.dumps(answer).encode(), headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the address and the names of the files that were downloaded, in their order."""
    served: list[str] = []
    handler = type("_HubOf", (_Hub,), {"folder": folder, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
