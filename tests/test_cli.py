"""The command line: instant help, errors as messages, and the data commands on a few real scenes."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import projects
from vlv.cli import doctor
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.io import files, pin


@pytest.fixture
def toy(tmp_path: Path, sprites: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = projects.toy(tmp_path / "toy", sprites)
    monkeypatch.setenv("VLV_ROOT", str(folder))
    return folder


def _vlv(*arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments), prog_name="vlv")
    return int(ended.value.code or 0)


def _change(project: Path, section: str, **values: object) -> None:
    params = project / "params.yaml"
    settings = yaml.safe_load(params.read_text())
    settings["data"][section] |= values
    params.write_text(yaml.safe_dump(settings))


def test_help_loads_nothing_heavy() -> None:
    heavy = {"torch", "mlflow", "great_expectations", "webdataset"}
    code = f"import sys, vlv.cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["run", "pretrain", "caption", "reconstruct", "promote", "rollback", "models", "doctor", "version"]
    for command in [
        *commands,
        "config use",
        "config show",
        "data download",
        "data import",
        "data verify",
        "data select",
        "data caption",
    ]:
        assert _vlv(*command.split(), "--help") == 0
        assert len(capsys.readouterr().out.split()) > 10


def test_a_library_error_is_shown_as_a_message(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _vlv("config", "use", "nope") == cli.ANSWER
    errors = capsys.readouterr().err
    assert "no profile 'nope'" in errors and "tiny" in errors and "Traceback" not in errors
    (toy / "params.yaml").write_text("profile: tiny\nsurprise: 1\n")
    assert _vlv("config", "show") == cli.ANSWER
    assert "surprise" in capsys.readouterr().err


def test_a_system_error_about_a_file_is_shown_as_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.App()

    @command.command()
    def write() -> None:
        (tmp_path / "file").write_text("")
        files.write_text(tmp_path / "file" / "inside", "text")  # as on a full disk, the system's error names the path

    with pytest.raises(SystemExit) as ended:
        command([])
    assert ended.value.code == cli.ANSWER
    told = capsys.readouterr().err
    assert str(tmp_path / "file") in told.replace("\n", "") and "Traceback" not in told


def test_a_bug_is_not_shown_as_a_message() -> None:
    assert not cli.is_answer(KeyError("x")) and not cli.is_answer(RuntimeError("x"))


@pytest.mark.parametrize("name", sorted(cli.EXIT_CODES))
def test_errors_with_their_own_exit_code_exist(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), kind), Exception)


def test_sigterm_is_an_ordinary_exit() -> None:
    code = "import os, signal; from vlv.cli import main as cli; cli._begin(); os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_config_use_and_show(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _vlv("config", "use", "tiny") == 0
    assert (toy / "params.yaml").read_bytes() == (toy / "configs" / "tiny.yaml").read_bytes()
    capsys.readouterr()
    assert _vlv("config", "show") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["register"]["promote"] is True and shown["stage1"]["accumulation"] == 1  # a default


def test_data_is_made_pinned_kept_refused_and_repaired(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _vlv("data", "download") == 0
    pinned = (toy / "data.dvc").read_bytes()
    assert yaml.safe_load(pinned)["meta"]["made_from"]["train"] == 24
    assert _vlv("data", "verify") == 0 and "data.dvc" in capsys.readouterr().out

    shard = toy / "data" / "train" / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-600] + b"?" + whole[-599:])
    assert _vlv("data", "download", "--if-missing") == 0  # it does not repair damage
    assert shard.read_bytes() != whole
    capsys.readouterr()
    assert _vlv("data", "verify") == cli.ANSWER
    assert "train/00001.tar" in capsys.readouterr().err
    assert _vlv("data", "download") == 0  # the remedy that the message names
    assert shard.read_bytes() == whole and (toy / "data.dvc").read_bytes() == pinned
    assert _vlv("data", "verify") == 0


def test_other_settings_make_other_data_with_its_own_pin(toy: Path) -> None:
    assert _vlv("data", "download", "--if-missing") == 0
    before = (toy / "data.dvc").read_bytes()
    _change(toy, "source", test=9)
    assert _vlv("data", "download", "--if-missing") == 0
    assert (toy / "data.dvc").read_bytes() != before
    assert _vlv("data", "verify") == 0


def test_the_same_settings_must_give_the_pinned_bytes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh clone has no data and no DVC cache, only the pin. The data made must be the pinned data."""
    assert _vlv("data", "download") == 0
    pinned = (toy / "data.dvc").read_text()
    for made in (toy / "data", toy / ".dvc" / "cache"):
        made.rename(made.with_name(made.name + ".away"))
    assert _vlv("data", "download", "--if-missing") == 0
    assert (toy / "data.dvc").read_text() == pinned
    assert _vlv("data", "verify") == 0
    # With another pin for the same settings the bytes differ, and they are not silently pinned again.
    md5 = yaml.safe_load(pinned)["outs"][0]["md5"]
    (toy / "data.dvc").write_text(pinned.replace(md5, "0" * 32 + ".dir"))
    assert _vlv("data", "download", "--if-missing") == 0
    capsys.readouterr()
    assert _vlv("data", "verify") == cli.ANSWER
    assert "data.dvc" in capsys.readouterr().err


def test_a_users_images_are_imported_and_pinned(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "0.txt").write_text("noise")
    (photos / "broken.jpg").write_bytes(b"no image")
    assert _vlv("data", "import", str(photos)) == 0
    told = capsys.readouterr()
    assert "broken.jpg" in told.err and "kept 6" in told.out and "kind: imported" in told.out
    made_from = pin.made_from(Paths(toy))
    assert made_from is not None and made_from["kind"] == "imported"
    assert _vlv("data", "verify") == 0


def test_doctor_finds_what_is_wrong(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _vlv("data", "download") == 0
    table = toy / "data" / "test" / "samples.parquet"
    table.write_bytes(table.read_bytes() + b"?")
    findings = {finding.what: finding for finding in doctor.examine(Paths(toy))}
    assert findings["data"].level == "problem" and "samples.parquet" in findings["data"].found
    assert findings["pretrained part"].level == "problem"  # the toy has none
    assert findings["dvc"].level == "ok" and findings["Python"].level == "ok"
    (toy / "requirements.lock").write_text("torch==0.0.1\nno-such-package==1\n")
    packages = {finding.what: finding for finding in doctor.examine(Paths(toy))}["packages"]
    assert "torch" in packages.found and "no-such-package missing" in packages.found
    capsys.readouterr()
    assert _vlv("doctor") == 1
    assert "problem" in capsys.readouterr().out
