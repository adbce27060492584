"""No command of README, docs/operate.md, make or the flow connects to a host that the user did not name. A listener
that catches all connections receives nothing.
"""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests import projects, servers
from tests.listener import Listener, listening
from vlv.io import telemetry

pytestmark = pytest.mark.server

# If one of these is set, MLflow and Prefect are silent by themselves, and the test proves nothing.
_TEST_RUNS = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "PYTEST_VERSION")
SWITCHES_ON = 'eval "$(python -m vlv.io.telemetry)" && exec '


def _environment(listener: Listener, **more: str) -> dict[str, str]:
    """A user's environment: no switch is set, and every connection to another machine goes to the listener."""
    clean = projects.environment()
    for name in (*telemetry.SWITCHES, *_TEST_RUNS):
        clean.pop(name, None)
    return {**clean, **listener.environment, **more}


def _run(command: list[str], project: Path, env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@contextmanager
def _running(command: list[str], project: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (project.parent / "output.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _prefect_server(project: Path, listener: Listener) -> Iterator[dict[str, str]]:
    """Start Prefect's server as in docs/operate.md; yields the environment that points to it."""
    port = servers.free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = _environment(listener, PREFECT_HOME=str(project / ".prefect"), PREFECT_API_URL=url)
    command = projects.python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with _running(command, project, env):
        servers.wait(lambda: servers.get(f"{url}/health") is True, "the Prefect server")
        yield env


def test_the_listener_hears_a_server_that_sends_telemetry(tmp_path: Path) -> None:
    """The control: outside the project folder nothing turns off the telemetry of Prefect's server."""
    (tmp_path / "elsewhere").mkdir()
    with listening() as listener, _prefect_server(tmp_path / "elsewhere", listener):
        servers.wait(lambda: bool(listener.calls), "the heartbeat")
    assert any("prefect.io" in call for call in listener.calls)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, sprites: Path) -> Path:
    project = projects.toy(tmp_path_factory.mktemp("connections") / "project", sprites)
    # The data gate needs its tokenizer.
    words = "pretrained/tiny/language_model"
    shutil.copytree(projects.REPOSITORY / words, project / words)
    projects.commit(project, "a language model")
    return project


def test_the_section_with_a_server_is_silent(toy: Path) -> None:
    prefect = projects.python("-m", "prefect")
    with listening() as listener, _prefect_server(toy, listener) as env:
        _run(projects.python("-m", "flows.full_train", "--make-pool"), toy, env)
        _run(
            projects.python("-m", "flows.full_train", "--make-pool"), toy, env
        )  # the second time it already exists, which is fine
        _run([*prefect, "--no-prompt", "deploy", "--all"], toy, env)
        with _running([*prefect, "worker", "start", "--pool", "vlv"], toy, env):
            _run([*prefect, "deployment", "run", "vlv/full-train", "--watch"], toy, env)
    assert listener.calls == []


def test_the_flow_alone_and_the_commands_are_silent(toy: Path) -> None:
    with listening() as listener:
        env = _environment(listener)
        _run(projects.python("-m", "flows.full_train"), toy, env)
        _run(projects.python("-m", "dvc", "status"), toy, env)
        _run(projects.python("-m", "dvc", "repro", "--force"), toy, env)
        _run(projects.python("-m", "vlv", "data", "verify"), toy, env)
        _run(projects.python("-m", "vlv", "run", "validate"), toy, env)
    assert listener.calls == []


@pytest.mark.parametrize(("switches", "silent"), [("exec ", False), (SWITCHES_ON, True)], ids=["without", "with"])
def test_mlflow_is_silent_in_a_shell_with_the_switches(toy: Path, switches: str, silent: bool) -> None:
    port = servers.free_port()
    command = f"{switches} python -m mlflow ui --port {port} --workers 1 --backend-store-uri sqlite:///{toy}/ui.db"
    experiments = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search"
    with listening() as listener, _running(["bash", "-c", command], toy, _environment(listener)):
        servers.wait(lambda: servers.get(experiments, {"max_results": 1}) is not None, "MLflow")
        if not silent:
            servers.wait(lambda: bool(listener.calls), "MLflow's telemetry")
    assert (listener.calls == []) == silent


def test_the_switches_are_set_in_one_place() -> None:
    settings = tomllib.loads((projects.REPOSITORY / "prefect.toml").read_text(encoding="utf-8"))
    assert settings == {"server": {"analytics_enabled": False}}
    restated = [
        f"{path.relative_to(projects.REPOSITORY)}: {name}"
        for folder in ("vlv", "flows")
        for path in (projects.REPOSITORY / folder).rglob("*.py")
        for name in telemetry.SWITCHES
        if name in path.read_text(encoding="utf-8") and path.name != "telemetry.py"
    ]
    assert restated == []
    compose = yaml.safe_load((projects.REPOSITORY / "mlflow" / "compose.yaml").read_text(encoding="utf-8"))
    server = compose["services"]["mlflow"]["environment"]  # YAML cannot import: MLflow's two must at least be equal
    switched = {name: value for name, value in server.items() if name in telemetry.SWITCHES}
    assert switched == {name: telemetry.SWITCHES[name] for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY")}
    shown = subprocess.check_output(projects.python("-m", "vlv.io.telemetry"), text=True, cwd=projects.REPOSITORY)
    assert dict(line.removeprefix("export ").split("=") for line in shown.splitlines()) == telemetry.SWITCHES


def test_a_users_own_setting_is_kept() -> None:
    command = "from vlv.io import telemetry; telemetry.off(); import os; print(os.environ['DO_NOT_TRACK'])"
    env = {**os.environ, "DO_NOT_TRACK": "1"}
    assert subprocess.check_output(projects.python("-c", command), text=True, env=env).strip() == "1"
