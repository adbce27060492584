"""docs/operate.md as a test: a real Prefect server, pool, worker and deployment; a real MLflow server and registry."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests import projects, servers

PREFECT = projects.python("-m", "prefect")

pytestmark = pytest.mark.server


@contextmanager
def _worker(project: Path, env: dict[str, str]) -> Iterator[Path]:
    """Deploy prefect.yaml and start a worker for it; yields the worker's log."""
    deployed = projects.run([*PREFECT, "--no-prompt", "deploy", "--all"], project, **env)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    path = project.parent / "worker.log"
    with path.open("wb") as log:
        command = [*PREFECT, "worker", "start", "--pool", "vlv"]
        worker = subprocess.Popen(
            command, cwd=project, env=projects.environment(**env), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield path
        finally:
            worker.terminate()
            worker.wait(120)


@pytest.mark.timeout(1200)  # the whole pipeline, each stage in its own process
def test_a_deployment_trains_registers_promotes_and_serves(
    tmp_path: Path, sprites: Path, prefect_server: dict[str, str], mlflow_server: str
) -> None:
    project = projects.smoke(tmp_path / "smoke", sprites)
    with _worker(project, {**prefect_server, "MLFLOW_TRACKING_URI": mlflow_server}) as log:
        run = projects.run([*PREFECT, "deployment", "run", "vlv/full-train", "--watch"], project, **prefect_server)
        assert run.returncode == 0, run.stdout + log.read_text()
    client = MlflowClient(mlflow_server)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=project, text=True).strip()
    for name in ("vlv-captioner-smoke", "vlv-autoencoder-smoke"):
        version = client.get_model_version_by_alias(name, "champion")
        assert int(version.version) == 1
        assert (version.tags["git_commit"], version.tags["git_dirty"]) == (commit, "false")
    _check_runs(client, str(version.run_id))
    assert _predict(project, mlflow_server, tmp_path) == _captions_of_evaluation(project)[:1]
    summary = servers.get(f"{prefect_server['PREFECT_API_URL']}/artifacts/run/latest")
    assert isinstance(summary, dict) and "vlv-captioner-smoke" in str(summary["data"])


def _check_runs(client: MlflowClient, register_run: str) -> None:
    """One parent run with the stages' runs nested; the trainings have their curves, the data and its digest."""
    register = client.get_run(register_run)
    parent = register.data.tags["mlflow.parentRunId"]
    nested = client.search_runs([register.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    by_stage = {run.info.run_name: run for run in nested}
    assert set(by_stage) == {"validate", "stage1", "stage2", "evaluate", "register"}
    curve = client.get_metric_history(by_stage["stage1"].info.run_id, "loss")
    assert [point.step for point in curve] == [2, 4, 6, 8, 10, 12]
    (data,) = by_stage["stage1"].inputs.dataset_inputs
    assert data.dataset.digest


def _predict(project: Path, url: str, scratch: Path) -> list[str]:
    """Send the first test image as in docs/operate.md; returns the captions."""
    image = next((project / "work" / "evaluate" / "pictures").glob("*-original.png")).read_bytes()
    question, answer = scratch / "images.json", scratch / "captions.json"
    rows = {"columns": ["image"], "data": [[base64.b64encode(image).decode()]]}
    question.write_text(json.dumps({"dataframe_split": rows}))
    command = projects.python("-m", "mlflow", "models", "predict", "-m", "models:/vlv-captioner-smoke@champion")
    options = ["--env-manager", "local", "-i", str(question), "-o", str(answer)]
    done = projects.run([*command, *options], scratch, MLFLOW_TRACKING_URI=url)
    assert done.returncode == 0, done.stderr
    predictions: list[dict[str, Any]] = json.loads(answer.read_text())["predictions"]
    return [row["caption"] for row in predictions]


def _captions_of_evaluation(project: Path) -> list[str]:
    captions = json.loads((project / "work" / "evaluate" / "captions.json").read_text())
    return [row["written"] for row in captions]


def test_cancelling_ends_the_child_processes(tmp_path: Path, ready_toy: Path, prefect_server: dict[str, str]) -> None:
    toy = Path(shutil.copytree(ready_toy, tmp_path / "toy", symlinks=True))
    api = prefect_server["PREFECT_API_URL"]
    with _worker(toy, {**prefect_server, "TOY": "sleep"}) as log:
        started = projects.run([*PREFECT, "deployment", "run", "vlv/full-train"], toy, **prefect_server)
        assert started.returncode == 0, started.stdout
        ids = servers.stage_processes(toy)
        # Only a deployment's flow run: the server also has flow runs of other tests, some of them killed.
        wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}, "deployment_id": {"is_null_": False}}}
        running = servers.get(f"{api}/flow_runs/filter", wanted)
        assert isinstance(running, list) and len(running) == 1, log.read_text()
        run = running[0]["id"]
        cancelled = projects.run([*PREFECT, "flow-run", "cancel", run], toy, **prefect_server)
        assert cancelled.returncode == 0, cancelled.stderr
        servers.wait(lambda: servers.gone(ids), "the end of the children")

        def state() -> object:
            found = servers.get(f"{api}/flow_runs/{run}")
            return found.get("state_type") if isinstance(found, dict) else None

        servers.wait(lambda: state() == "CANCELLED", "the state Cancelled")


def test_the_kubernetes_deployment_registers_with_its_job_template(
    tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    project = projects.bare(tmp_path / "project")
    template = ["--base-job-template", "configs/kubernetes/job-template.json"]
    made = projects.run(
        [*PREFECT, "work-pool", "create", "vlv-gpus", "--type", "kubernetes", *template], project, **prefect_server
    )
    assert made.returncode == 0, made.stdout + made.stderr
    file = ["--prefect-file", "configs/kubernetes/prefect.yaml"]
    deployed = projects.run([*PREFECT, "--no-prompt", "deploy", "--all", *file], project, **prefect_server)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    deployment = servers.get(f"{prefect_server['PREFECT_API_URL']}/deployments/name/vlv/full-train-gpus")
    assert isinstance(deployment, dict)
    assert (deployment["work_pool_name"], deployment["job_variables"]["gpus"]) == ("vlv-gpus", 8)
    pool = servers.get(f"{prefect_server['PREFECT_API_URL']}/work_pools/vlv-gpus")
    assert isinstance(pool, dict)
    container = pool["base_job_template"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
