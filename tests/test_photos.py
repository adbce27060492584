"""Your own photographs: from a folder of pictures and sentences to registered models, without an edit by hand."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests import photographs
from tests.conftest import ROOT
from vlv import stages
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.io import files, pin

COUNT = 64


def _vlv(*arguments: str) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments), prog_name="vlv")
    return int(ended.value.code or 0)


def _promised() -> list[str]:
    """All outputs of the stages in dvc.yaml."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    kinds = [stage.get(kind, []) for stage in graph["stages"].values() for kind in ("outs", "metrics", "plots")]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entries in kinds for entry in entries]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs.write(tmp_path_factory.mktemp("photographs") / "pictures", COUNT)


@pytest.fixture(scope="module")
def small(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    sentences = [path.read_text(encoding="utf-8").strip() for path in sorted(pictures.glob("*.txt"))]
    return photographs.parts(tmp_path_factory.mktemp("parts"), sentences)


@pytest.mark.training
@pytest.mark.parametrize("profile", ["photos", "photos-offline"])
def test_from_the_import_to_the_registry(
    profile: str, pictures: Path, small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = photographs.project(tmp_path / "project", profile, small)
    monkeypatch.setenv("VLV_ROOT", str(project))
    assert _vlv("config", "use", profile) == 0
    assert _vlv("data", "import", str(pictures), "--description", "summer of 2025") == 0
    for stage in stages.NAMES:
        assert _vlv("run", stage) == 0, stage
    assert (project / "params.yaml").read_bytes() == (project / "configs" / f"{profile}.yaml").read_bytes()

    made_from = pin.made_from(Paths(project))
    assert made_from is not None and made_from["description"] == "summer of 2025"
    rows = pq.read_table(project / "data" / "train" / "samples.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"success"}, "nothing of an ordinary set is left out"
    validated, trained, evaluated, registered = (
        files.read_json(project / "metrics" / f"{name}.json") for name in ("validate", "stage2", "evaluate", "register")
    )
    assert validated["success"] and sum(validated["samples"].values()) == COUNT
    assert trained["captions_cut"] == 0
    assert -1 <= evaluated["captions"]["similarity"] <= 1
    assert {"upper_bound", "vae", "baselines"} <= set(evaluated["reconstruction"])
    assert registered["stage1"]["version"] == registered["stage2"]["version"] == 1
    assert [path for path in _promised() if not (project / path).exists()] == [], "dvc repro would miss them"


def test_without_an_import_the_error_names_it(
    small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLV_ROOT", str(photographs.project(tmp_path / "project", "photos", small)))
    assert _vlv("config", "use", "photos") == 0
    assert _vlv("data", "download") == cli.ANSWER
    told = capsys.readouterr().err
    assert "vlv data import" in told, told
