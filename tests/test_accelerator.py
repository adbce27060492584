"""The pipeline does the same on an accelerator as on a CPU. tests/pretend.py simulates an accelerator."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import projects
from vlv.io import files

PRETEND = Path(__file__).with_name("pretend.py")
# Covers many options: cached latents, decoded images, samples grouped by length, a trainable encoder.
CHANGES: dict[str, dict[str, Any]] = {
    "stage1": {"cache_features": False, "steps": 8, "checkpoint_every": 2},
    "stage2": {"learn": "mlp+llm+encoder", "batching": "bucketed", "steps": 8},
}
STAGES = ("stage1", "stage2", "evaluate")


def test_the_accelerator_refuses_what_a_gpu_refuses(tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import pretend; kept = pretend.install()\n"
        "there, here = torch.ones(2, device='pretend:0'), torch.ones(2)\n"
        "assert (there + 1).cpu().tolist() == [2, 2] and (there + there).device.type == 'pretend'\n"
        "for wrong in (lambda: there + here, lambda: torch.cat([here, there]), lambda: there.numpy()):\n"
        "    try: wrong()\n"
        "    except (RuntimeError, TypeError) as error: print(error)\n"
        "    else: sys.exit('was not refused')\n"
    )
    command = [sys.executable, "-c", code, str(PRETEND.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same device") == 2


@pytest.mark.training
def test_a_training_that_began_on_a_cpu_resumes_on_the_accelerator(tmp_path: Path, smoke: Path) -> None:
    cpu, other = smoke, tmp_path / "other"
    settings = yaml.safe_load((cpu / "params.yaml").read_text(encoding="utf-8"))
    for section, changes in CHANGES.items():
        settings[section] |= changes
    (cpu / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.copytree(cpu, other, symlinks=True)
    assert projects.kill_after(other, "stage1", lines=2)  # four steps: after the checkpoint of the second
    stages = "import pathlib, vlv.config, vlv.stages as s; paths = vlv.config.Paths(pathlib.Path.cwd())"
    _succeeds(projects.python("-c", "; ".join([stages, *(f"s.run('{stage}', paths)" for stage in STAGES)])), cpu)

    # As a user does; `vlv caption` finds the captioner that was just trained.
    use = ["caption work/evaluate/pictures -o captions.json", "reconstruct work/evaluate/pictures -o drawn --steps 2"]
    told = _succeeds(projects.python(str(PRETEND), *(f"run {stage}" for stage in STAGES), *use), other)
    assert "resuming from step" in told
    counts = [int(count) for count in re.findall(r"^(\d+) operations on pretend:0", told, re.MULTILINE)]
    assert len(counts) == len(STAGES) + len(use) and min(counts) > 1000, counts
    for stage in ("stage1", "stage2"):
        assert _figures(other, stage)["final_loss"] == pytest.approx(_figures(cpu, stage)["final_loss"], rel=1e-3)
    captions = [files.read_json(project / "work" / "evaluate" / "captions.json") for project in (cpu, other)]
    assert captions[0] == captions[1]
    for kind in ("upper_bound", "vae"):
        drawn = [_figures(project, "evaluate")["reconstruction"][kind]["psnr"] for project in (cpu, other)]
        assert drawn[0] == pytest.approx(drawn[1], abs=0.1)  # the CPU's are drawn in bf16
    pictures = len(list((other / "work" / "evaluate" / "pictures").glob("*.png")))
    assert len(files.read_json(other / "captions.json")) == pictures
    assert len(list((other / "drawn").glob("*.png"))) == pictures


def _succeeds(command: list[str], project: Path) -> str:
    """Run a command that must succeed; return its standard error."""
    done = projects.run(command, project)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _figures(project: Path, stage: str) -> Any:
    return files.read_json(project / "metrics" / f"{stage}.json")
