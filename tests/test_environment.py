"""The lock, the Makefile and what runs them agree."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _locked() -> dict[str, tuple[str, list[str]]]:
    """Package -> its version and the hashes of its files."""
    lines = [line for line in _text("requirements.lock").splitlines() if not line.startswith("#")]
    entries = re.findall(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", "\n".join(lines), re.MULTILINE)
    assert len(lines) == sum(1 + entry[2].count("--hash") for entry in entries), "a line is neither pin nor hash"
    return {canonicalize_name(name): (version, hashes.split(" \\\n")[1:]) for name, version, hashes in entries}


def _project() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for: all the time, and for development."""
    project = tomllib.loads(_text("pyproject.toml"))["project"]
    asked = {"always": project["dependencies"], "dev": project["optional-dependencies"]["dev"]}
    return {name: [Requirement(one) for one in requirements] for name, requirements in asked.items()}


def test_the_lock_pins_every_dependency_except_torch_with_hashes() -> None:
    locked = _locked()
    assert [name for name, (_, hashes) in locked.items() if not hashes] == []
    asked = [requirement for group in _project().values() for requirement in group]
    missing = [one.name for one in asked if canonicalize_name(one.name) not in locked]
    assert missing == ["torch"], "its builds come from different indexes; pyproject.toml pins it"
    wrong = [
        str(one) for one in asked if one.name != "torch" and locked[canonicalize_name(one.name)][0] not in one.specifier
    ]
    assert wrong == []
    assert "torch==2" in str(next(one for one in asked if one.name == "torch"))


def test_lock_and_makefile_name_no_index() -> None:
    for name in ("requirements.lock", "Makefile"):
        assert not re.search(r"://|index-url|find-links|[\w-]\.(com|io|net|org)\b", _text(name)), name


def test_the_workflow_runs_what_contributing_names() -> None:
    workflow = yaml.safe_load(_text(".github/workflows/check.yaml"))
    runs = [step["run"].split()[:2] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [["make", "check"], ["make", "coverage"], ["make", "docs"], ["make", "test"]]
    targets = set(re.findall(r"^([a-z]+):", _text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", _text("CONTRIBUTING.md"), re.MULTILINE))
    assert {"check", "test", "kills"} <= named <= targets
    assert _text(".ci/run").splitlines()[-1] == "make test" and "make test" in _text("README.md")


def test_markers_are_explained() -> None:
    markers = tomllib.loads(_text("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    own = {marker.partition(":")[0] for marker in markers} - {"xdist_group(name)"}
    assert own == set(re.findall(r"^\| `(\w+)` \|", _text("CONTRIBUTING.md"), re.MULTILINE))
