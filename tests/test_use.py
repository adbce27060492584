"""`vlv caption` and `vlv reconstruct` on folders as people have them: damaged files, names of all kinds, kills."""

import base64
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from mlflow.pyfunc.model import PythonModelContext

from tests import image_sets
from tests.conftest import ROOT, profile
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.io import images, json_lines
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

_ODD = os.fsdecode(b"caf\xe9.jpg")


@pytest.fixture(scope="module")
def models(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models of the smoke profile: stage1, stage2, and a stage2 of another seed."""
    folder, settings = tmp_path_factory.mktemp("models"), profile("smoke")
    Autoencoder.build(settings, paths).save(folder / "stage1", settings, paths, "A card.")
    Captioner.build(settings, paths).save(folder / "stage2", settings, paths, "A card.")
    other = settings.model_copy(update={"stage1": settings.stage1.model_copy(update={"seed": 99})})
    Captioner.build(other, paths).save(folder / "other", other, paths, "A card.")
    return folder


def _vlv(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments), prog_name="vlv")
    return int(ended.value.code or 0)


def _caption(folder: Path, output: Path, model: Path) -> int:
    return _vlv("caption", str(folder), "-o", str(output), "--model", str(model))


def _photos(folder: Path, count: int) -> Path:
    image_sets.pictures(folder, range(count))
    return folder


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLV_ROOT", str(ROOT))


def test_names_round_trip_and_failures_are_reported(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, output = _photos(tmp_path / "photos", 3), tmp_path / "captions.json"
    (photos / _ODD).write_bytes(image_sets.photo(7))
    (photos / "zz.jpg").write_bytes(image_sets.photo(8))  # after the odd one
    (photos / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    (photos / "folder.jpg").mkdir()
    assert _caption(photos, output, models / "stage2") == cli.SOME_FAILED
    told = capsys.readouterr()
    assert "5 captions in" in told.out
    assert (
        "2 of 7 images failed" in told.err and "captions.json.failures.jsonl" in told.err and "folder.jpg" in told.err
    )
    written = json.loads(output.read_bytes().decode("utf-8"))
    assert {os.fsencode(name) for name in written} == {
        b"photo0000.jpg", b"photo0001.jpg", b"photo0002.jpg", b"zz.jpg", b"caf\xe9.jpg",
    }  # fmt: skip
    failures = tmp_path / "captions.json.failures.jsonl"
    failed = [json.loads(line) for line in failures.read_bytes().decode("utf-8").splitlines()]
    assert {os.fsencode(row["image"]): row["reason"] for row in failed} == {
        b"folder.jpg": "not a file",
        b"\xff.png": "not a readable image (none of JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF)",
    }

    # The same command tries only failed images again; it keeps its captions, except for an image that has changed.
    (photos / os.fsdecode(b"\xff.png")).write_bytes(image_sets.photo(9))
    shutil.rmtree(photos / "folder.jpg")
    partial = tmp_path / "captions.json.partial"
    rows = json_lines.read(partial)
    marked = [row | {"caption": f"kept {row['image']}"} if "image" in row else row for row in rows]
    json_lines.write(partial, marked)
    (photos / "zz.jpg").write_bytes(image_sets.photo(88))
    assert _caption(photos, output, models / "stage2") == 0
    again = json.loads(output.read_text())
    assert len(again) == 6 and again[_ODD] == f"kept {_ODD}" and again["photo0000.jpg"] == "kept photo0000.jpg"
    assert not again["zz.jpg"].startswith("kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.json", "photos"]


def test_captions_of_another_model_are_not_mixed(models: Path, tmp_path: Path) -> None:
    photos, output = _photos(tmp_path / "photos", 3), tmp_path / "captions.json"
    (photos / "broken.jpg").write_bytes(b"")
    assert _caption(photos, output, models / "stage2") == cli.SOME_FAILED
    partial = tmp_path / "captions.json.partial"
    before = json_lines.read(partial)
    assert _caption(photos, output, models / "other") == cli.SOME_FAILED
    after = json_lines.read(partial)
    assert before[0] != after[0] and len(before) == len(after) == 4


def test_the_output_stays_if_no_image_can_be_read(models: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "captions.json"
    photos.mkdir()
    for number in range(80):
        (photos / f"{number}.jpg").write_bytes(b"no image")
    output.write_text('{"what": "was there"}')
    assert _caption(photos, output, models / "stage2") == cli.ALL_FAILED
    assert json.loads(output.read_text()) == {"what": "was there"}
    failures = json_lines.read(tmp_path / "captions.json.failures.jsonl")
    assert len(failures) == 80 and not (tmp_path / "captions.json.partial").exists()


def test_a_killed_run_continues_after_a_torn_line(models: Path, tmp_path: Path) -> None:
    photos = _photos(tmp_path / "photos", 8)
    (photos / _ODD).write_bytes(image_sets.photo(77))
    broken, output, partial = photos / "broken.jpg", tmp_path / "captions.json", tmp_path / "captions.json.partial"
    broken.write_bytes(b"")  # keeps the partial file
    assert _caption(photos, output, models / "stage2") == cli.SOME_FAILED
    whole = json.loads(output.read_text())
    broken.unlink()
    lines = partial.read_bytes().splitlines(keepends=True)
    for kept, torn in ((5, 20), (1, 0), (0, 30)):
        output.unlink()
        partial.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])  # what kill -9 or a power cut leave
        assert _caption(photos, output, models / "stage2") == 0
        assert json.loads(output.read_text()) == whole and not partial.exists()


def test_reconstructions_of_odd_names_and_damaged_files(models: Path, tmp_path: Path) -> None:
    photos, output = _photos(tmp_path / "photos", 1), tmp_path / "drawn"
    (photos / _ODD).write_bytes(image_sets.photo(7))
    command = ["reconstruct", str(photos), "-o", str(output), "--steps", "1", "--model", str(models / "stage1")]
    assert _vlv(*command) == 0
    (photos / "broken.jpg").write_bytes(b"")
    assert _vlv(*command) == cli.SOME_FAILED
    assert (output / f"{_ODD}.png").is_file() and (output / "side-by-side" / f"{_ODD}.png").is_file()
    figures = json.loads((output / "figures.json").read_bytes().decode("utf-8"))
    assert set(figures["psnr"]) == {"photo0000.jpg", _ODD} and set(figures["failed"]) == {"broken.jpg"}
    assert [row["image"] for row in json_lines.read(output / "failures.jsonl")] == ["broken.jpg"]
    for path in photos.iterdir():
        path.write_bytes(b"")
    assert _vlv(*command) == cli.ALL_FAILED


@pytest.mark.parametrize("content", [b"", b"DDS \x7c\0\0\0" + bytes(200), b"BLP2" + bytes(200), None])
def test_a_served_model_names_the_row_that_it_cannot_read(content: bytes | None, models: Path, paths: Paths) -> None:
    from vlv.registry.serving import AutoencoderModel, CaptionerModel

    captioner, autoencoder = CaptionerModel(), AutoencoderModel()
    captioner.captioner = Captioner.load(models / "stage2", paths)
    autoencoder.autoencoder = Autoencoder.load(models / "stage1", paths)
    good = base64.b64encode(image_sets.photo(0)).decode()
    table = pd.DataFrame({"image": [good, "no base64" if content is None else base64.b64encode(content).decode()]})
    context = PythonModelContext(artifacts={}, model_config={})
    for model in (captioner, autoencoder):
        with pytest.raises(images.ImageError, match=r"^row 1: not "):
            model.predict(context, table)
    assert len(captioner.predict(context, table[:1])) == 1
