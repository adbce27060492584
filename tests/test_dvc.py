"""DVC on the real pipeline with the smoke profile: current stages, stale stages, push and pull."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import projects

pytestmark = pytest.mark.training
STAGES = ["inputs", "validate", "stage1", "stage2", "evaluate", "register"]


def _dvc(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = projects.run(projects.python("-m", "dvc", *arguments), project)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _ran(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)'", output, flags=re.MULTILINE)


def test_after_a_run_everything_is_current_and_committed(trained_smoke: Path, trained: Path) -> None:
    assert _ran(trained_smoke.with_name("trained.log").read_text(encoding="utf-8")) == STAGES
    assert json.loads(_dvc(trained, "status", "--json").stdout) == {}
    assert "up to date" in _dvc(trained, "repro").stdout
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=trained, capture_output=True, text=True)
    assert dirty.stdout == ""


def test_a_stage2_parameter_makes_stage2_and_later_stages_run(trained: Path) -> None:
    params = trained / "params.yaml"
    before, after = "  seed: 2\n", "  seed: 3\n"
    assert params.read_text().count(before) == 1
    params.write_text(params.read_text().replace(before, after))
    model = {path: path.read_bytes() for path in (trained / "work" / "stage1" / "model").iterdir() if path.is_file()}
    done = _dvc(trained, "repro")
    assert _ran(done.stdout) == ["inputs", "stage2", "evaluate", "register"]
    assert model and all(path.read_bytes() == content for path, content in model.items())
    # DVC's own report of the change
    assert json.loads(_dvc(trained, "params", "diff", "--json").stdout) == {
        "params.yaml": {"stage2.seed": {"old": 2, "new": 3, "diff": 1}}
    }
    changed = json.loads(_dvc(trained, "metrics", "diff", "--json").stdout)
    assert "metrics/stage2.json" in changed and "metrics/stage1.json" not in changed
    shown = _dvc(trained, "plots", "show", "--out", "shown").stdout
    page = (trained / "shown" / "index.html").read_text(encoding="utf-8")
    assert "index.html" in shown and "Stage 1: denoising loss" in page and "evaluate_grid" in page


def test_a_code_change_runs_its_stage_on_new_caches_and_a_comment_runs_nothing(trained: Path) -> None:
    decoder = trained / "vlv" / "models" / "decoders" / "base.py"
    decoder.write_text(decoder.read_text() + "\n# a comment\n")
    assert _ran(_dvc(trained, "repro").stdout) == ["inputs"]
    weights, cached = trained / "work/stage1/model/model.safetensors", trained / ".cache"
    before, latents = weights.read_bytes(), set(cached.glob("latents-*"))
    old, new = "posterior.std * scale", "posterior.std * scale * 3.0"
    assert decoder.read_text().count(old) == 1
    decoder.write_text(decoder.read_text().replace(old, new))
    assert _ran(_dvc(trained, "repro", "stage1").stdout) == ["inputs", "stage1"]
    assert weights.read_bytes() != before
    assert len(set(cached.glob("latents-*")) - latents) == 1


def test_a_fresh_clone_makes_the_pinned_data_without_a_remote(trained_smoke: Path, tmp_path: Path) -> None:
    clone = _clone(trained_smoke, tmp_path / "clone")
    assert not (clone / "data").exists()
    pin = (clone / "data.dvc").read_bytes()
    for command in ("download", "verify"):
        done = projects.run(projects.python("-m", "vlv", "data", command), clone)
        assert done.returncode == 0, done.stderr
    assert (clone / "data.dvc").read_bytes() == pin
    assert json.loads(_dvc(clone, "status", "--json", "data.dvc").stdout) == {}
    stale = json.loads(_dvc(clone, "status", "--json").stdout)
    assert set(stale) == set(STAGES)  # results are pinned, but the models are missing, so all stages run


def test_push_fresh_clone_pull(trained: Path, tmp_path: Path) -> None:
    _dvc(trained, "remote", "add", "--default", "here", str(tmp_path / "remote"))
    projects.commit(trained, "a remote")
    _dvc(trained, "push")
    clone = _clone(trained, tmp_path / "clone")
    _dvc(clone, "pull")
    # Everything but the registry is there. It belongs to the machine, so only registration runs.
    assert set(json.loads(_dvc(clone, "status", "--json").stdout)) == {"register"}
    verified = projects.run(projects.python("-m", "vlv", "data", "verify"), clone)
    assert verified.returncode == 0, verified.stderr


def test_poisoned_data_stops_at_the_gate_even_without_the_flow(trained: Path) -> None:
    """`dvc repro` by itself accepts changed data; the gate compares it with the manifest."""
    shard = trained / "data" / "train" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    done = projects.run(projects.python("-m", "dvc", "repro"), trained)
    assert done.returncode != 0
    assert _ran(done.stdout) == ["validate"]
    assert "00000.tar" in done.stdout + done.stderr


def _clone(project: Path, target: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(project), str(target)], check=True)
    return target
