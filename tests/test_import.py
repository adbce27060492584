"""`vlv data import`: all formats give the same samples, memory does not grow, and a kill changes no byte."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import image_sets
from tests.conftest import tiny
from tests.test_data import hashes
from vlv import config
from vlv.data import shards, sources
from vlv.data.import_.importer import ImportReport, Wanted, import_images
from vlv.data.import_.recipe import SPLITS, Recipe, Shares
from vlv.data.readers import captions, formats
from vlv.data.readers.formats import ReadOptions
from vlv.data.shards import DataError, Sample
from vlv.io import images

HALVES = Shares(validation=0.2, test=0.2)


def wanted(**changes: Any) -> Wanted:
    """64 pixels, 10 samples in a shard."""
    values: dict[str, Any] = {"recipe": Recipe(64, 64, 2.0), "shard_size": 10}
    return Wanted(**{**values, **changes})


def samples(data: Path) -> Iterator[tuple[str, Sample]]:
    """Every sample with its split, read against the manifest."""
    for split, entry in shards.read_manifest(data).splits.items():
        for shard in entry.shards:
            yield from ((split, sample) for sample in shards.read_shard(data / split / shard.name, shard))


def contents(data: Path) -> dict[str, tuple[str, str | None]]:
    """Hash of the stored image -> split and caption."""
    return {sample.meta["sha256"]: (split, sample.caption) for split, sample in samples(data)}


def rows(data: Path) -> pd.DataFrame:
    return pd.concat(pd.read_parquet(data / split / "samples.parquet") for split in SPLITS)


@pytest.mark.parametrize("name", image_sets.MAKERS)
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    plain = image_sets.folder(tmp_path / "plain", 24)
    import_images(plain, tmp_path / "expected", wanted(shares=HALVES))
    expected = contents(tmp_path / "expected")
    assert {caption for _, caption in expected.values()} == {image_sets.caption(i) for i in range(24)}
    assert {split for split, _ in expected.values()} == set(SPLITS)

    make, format_ = image_sets.MAKERS[name]
    source = make(tmp_path / name, 24)
    assert formats.guess(source) == format_
    report = import_images(source, tmp_path / "data", wanted(shares=HALVES, reading=ReadOptions(rule="first")))
    assert contents(tmp_path / "data") == expected
    shards.verify(tmp_path / "data", None)
    failed = {"img2dataset": 2, "img2dataset-gz": 2, "img2dataset-files": 1}.get(name, 0)
    assert report.tally.dropped == ({"failed_to_download": failed} if failed else {})
    assert len(rows(tmp_path / "data")) == report.tally.found == 24 + failed


def test_our_own_shards_keep_their_splits_and_bytes(scene_data: Path, tmp_path: Path) -> None:
    assert formats.guess(scene_data) == "shards"
    import_images(scene_data, tmp_path / "again", wanted(shard_size=20))
    before = {(split, *_whole(sample)) for split, sample in samples(scene_data)}
    assert {(split, *_whole(sample)) for split, sample in samples(tmp_path / "again")} == before


def _whole(sample: Sample) -> tuple[bytes, str | None, str]:
    return sample.image, sample.caption, json.dumps(sample.meta, sort_keys=True)


def test_each_dropped_sample_has_a_reason(tmp_path: Path) -> None:
    folder = image_sets.folder(tmp_path / "photographs", 24)
    first = folder / "group0" / "photo0000.jpg"
    (folder / "group0" / "photo0003.txt").write_text("  \n")
    (folder / "group0" / "photo0006.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "group2" / "photo0002.json").write_text("{not json")
    nested = folder / "deep" / "er"
    nested.mkdir(parents=True)
    (nested / "copy.JPG").write_bytes(first.read_bytes())
    (nested / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (nested / "cut.jpg").write_bytes(first.read_bytes()[:700])
    Image.new("RGB", (300, 100)).save(nested / "wide.webp")
    Image.new("RGB", (40, 40)).save(nested / "tiny.bmp")
    Image.new("CMYK", (90, 90), (9, 80, 7, 6)).save(nested / "cmyk.jpg")
    (nested / "notes.md").write_text("not an image")
    report = import_images(folder, tmp_path / "data", wanted())

    notes = {(note.path, note.reason) for note in report.notes}
    twins = {("group0/photo0000.jpg", "duplicate"), ("deep/er/copy.JPG", "duplicate")}  # whichever comes second
    assert len(notes & twins) == 1
    assert notes - twins == {
        ("deep/er/broken.png", "unreadable"), ("deep/er/cut.jpg", "unreadable"), ("deep/er/wide.webp", "aspect"),
        ("deep/er/tiny.bmp", "too_small"), ("group0/photo0003.jpg", "caption_empty"),
        ("group0/photo0006.jpg", "caption_unreadable"), ("group2/photo0002.jpg", "caption_unreadable"),
    }  # fmt: skip
    counts = report.counts()
    assert counts.pop("with_caption") in (20, 21)  # whether the twin with or without caption was kept
    assert counts == {
        "found": 30, "kept": 25, "aspect": 1, "caption_empty": 1, "caption_unreadable": 2, "duplicate": 1,
        "too_small": 1, "unreadable": 2,
    }  # fmt: skip
    table = rows(tmp_path / "data").set_index("url")
    assert table.loc["deep/er/cut.jpg", "status"] == "unreadable"
    assert "cut.jpg" in str(table.loc["deep/er/cut.jpg", "error_message"])
    assert table.loc["deep/er/wide.webp", "original_width"] == 300
    assert "caption_empty" in str(table.loc["group0/photo0003.jpg", "error_message"])
    assert (table["status"] == "success").sum() == 25


def test_a_damaged_tar_gives_its_samples_before_the_damage(tmp_path: Path) -> None:
    source = image_sets.img2dataset_tars(tmp_path / "tars", 20)
    path = source / "00001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("000010004.jpg")
    path.write_bytes(path.read_bytes()[: member.offset_data + 100])
    report = import_images(source, tmp_path / "data", wanted())
    assert report.tally.kept == 14
    assert report.tally.dropped == {"damaged_file": 1, "missing_in_tar": 6, "failed_to_download": 2}


def test_metadata_of_a_download_is_kept_without_the_place_where_it_was_taken(tmp_path: Path) -> None:
    import_images(image_sets.img2dataset_tars(tmp_path / "tars", 4), tmp_path / "data", wanted())
    for _, sample in samples(tmp_path / "data"):
        assert sample.meta["source"].startswith("https://example.org/")
        assert sample.meta["origin"]["similarity"] == 0.3
        assert "GPS" not in json.dumps(sample.meta)


# --- splits


def test_new_images_do_not_change_the_split_of_others(tmp_path: Path) -> None:
    import_images(image_sets.folder(tmp_path / "few", 30), tmp_path / "data", wanted(shares=HALVES))
    before = contents(tmp_path / "data")
    import_images(image_sets.folder(tmp_path / "more", 60), tmp_path / "data", wanted(shares=HALVES))
    after = contents(tmp_path / "data")
    assert len(after) == 60 and before.items() <= after.items()
    import_images(tmp_path / "more", tmp_path / "data", wanted(shares=Shares(0.2, 0.2, seed=1)))
    assert contents(tmp_path / "data").items() != after.items()


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 3), (12, 3)])
def test_a_small_set_fills_every_split(count: int, expected: int, tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", count)
    manifest = import_images(source, tmp_path / "data", wanted(shares=Shares(0.001, 0.001))).manifest
    assert sum(split.samples >= 1 for split in manifest.splits.values()) == expected
    assert sum(split.samples for split in manifest.splits.values()) == count
    shards.verify(tmp_path / "data", None)


def test_splits_have_their_shares() -> None:
    shares = Shares(0.02, 0.08, seed=3)
    split = [shares.split_of(str(i)) for i in range(20_000)]
    assert split.count("validation") == pytest.approx(400, abs=60)
    assert split.count("test") == pytest.approx(1600, abs=120)


# --- choice of captions


def test_a_named_rule_chooses_one_of_several_captions(tmp_path: Path) -> None:
    source = image_sets.coco(tmp_path / "coco", 12)
    chosen: dict[Any, dict[str, str | None]] = {}
    for rule, seed in (("seeded", 0), ("seeded", 1), ("longest", 0), ("first", 0)):
        reading = ReadOptions(rule=cast(Any, rule), seed=seed)
        import_images(source, tmp_path / "data", wanted(reading=reading))
        found = [sample for _, sample in samples(tmp_path / "data")]
        chosen[rule, seed] = {sample.meta["source"]: sample.caption for sample in found}
        assert {len(sample.meta["captions"]) for sample in found} == {2}
        assert all(sample.caption not in sample.meta["captions"] for sample in found)
    assert all(text is not None and text.startswith("Third") for text in chosen["longest", 0].values())
    assert chosen["seeded", 0] != chosen["seeded", 1]
    assert len({str(text)[:3] for text in chosen["seeded", 0].values()}) == 3  # not always the same place
    draws = [captions.choose(["a", "b", "c"], "seeded", 0, str(i)) for i in range(3000)]
    assert all(draws.count(i) == pytest.approx(1000, abs=120) for i in range(3))


def test_coco_counts_unusable_images_by_reason(tmp_path: Path) -> None:
    path = image_sets.coco(tmp_path / "coco", 6)
    value = json.loads(path.read_text())
    value["images"] += [{"id": 1, "file_name": "../../secret.jpg"}, {"id": 2, "file_name": "none.jpg"}]
    value["annotations"] = [note for note in value["annotations"] if note["image_id"] != 1003]
    path.write_text(json.dumps(value))
    (tmp_path / "secret.jpg").write_bytes(image_sets.photo(99))
    report = import_images(path, tmp_path / "data", wanted())
    assert report.tally.dropped == {"outside_folder": 1, "image_missing": 1}
    assert report.tally.captions_left_out == {"caption_missing": 1}
    path.write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(DataError, match="file_name"):
        import_images(path, tmp_path / "data", wanted())


def test_captions_of_a_table_have_priority_over_those_of_the_source(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", 6)
    table = [{"sha256": _sha(image_sets.photo(i)), "caption": f"Better {i}."} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "captions.parquet")
    import_images(source, tmp_path / "data", wanted(captions=tmp_path / "captions.parquet"))
    texts = {caption for _, caption in contents(tmp_path / "data").values()}
    assert texts == {f"Better {i}." for i in range(3)} | {image_sets.caption(i) for i in range(3, 6)}
    (tmp_path / "captions.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"captions\.parquet is not a table of captions"):
        import_images(source, tmp_path / "data", wanted(captions=tmp_path / "captions.parquet"))


def _sha(data: bytes) -> str:
    from vlv.io import files

    return files.sha256_bytes(data)


# --- parquet and the hub


def test_columns_that_cannot_be_guessed_are_listed(tmp_path: Path) -> None:
    row = {"picture": image_sets.photo(0), "thumb": image_sets.photo(0), "alt": "Words.", "n": 1}
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match=r"--image-column.*picture \(binary\).*alt \(string\)"):
        import_images(path, tmp_path / "data", wanted())
    with pytest.raises(DataError, match=r"--caption-column.*picture \(binary\)"):
        import_images(path, tmp_path / "data", wanted(reading=ReadOptions(image_column="picture")))
    with pytest.raises(DataError, match="'n' holds no text"):
        import_images(path, tmp_path / "data", wanted(reading=ReadOptions(None, None, "picture", "n")))
    import_images(path, tmp_path / "data", wanted(reading=ReadOptions(None, None, "picture", "alt")))
    assert [caption for _, caption in contents(tmp_path / "data").values()] == ["Words."]


def test_a_data_set_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    image_sets.parquet(snapshot / "data", 4)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "from pathlib import Path; from vlv.io import assets; from vlv import config; "
        "print(assets.resolve('hf:datasets/owner/name', config.Paths(Path())))"
    )
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == snapshot
    report = import_images(Path(done.stdout.strip()), tmp_path / "data", wanted())
    assert report.counts() == {"found": 4, "kept": 4, "with_caption": 4}


def test_images_given_by_path_only_and_repeated_captions(tmp_path: Path) -> None:
    table = [
        {"image": {"bytes": None, "path": "elsewhere.jpg"}, "captions": ["One."]},
        {"image": {"bytes": image_sets.photo(1), "path": None}, "captions": ["One.", "Two."]},
        {"image": {"bytes": image_sets.photo(2), "path": None}, "captions": []},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "set.parquet")
    report = import_images(tmp_path / "set.parquet", tmp_path / "data", wanted(reading=ReadOptions(rule="first")))
    assert report.tally.dropped == {"image_missing": 1}
    assert "elsewhere.jpg" in report.notes[0].message
    assert {caption for _, caption in contents(tmp_path / "data").values()} == {"One.", None}


# --- the same bytes, always


CHILD = """
import sys
from pathlib import Path
from tests.test_import import wanted
from vlv.data.import_.importer import import_images
peak = Path("/proc/self/clear_refs")
if peak.exists():
    peak.write_text("5")  # forget the peak of the imports
import_images(Path(sys.argv[1]), Path(sys.argv[2]), wanted(), workers=1)
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss would count the parent's memory, which the child has before exec
    print(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
def test_a_killed_import_continues_to_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = image_sets.folder(tmp_path / "photographs", 300)
    import_images(source, tmp_path / "whole" / "data", wanted(), workers=3)
    data, staging = tmp_path / "killed" / "data", tmp_path / "killed" / ".import.data"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(data)])
    while not (staging / "00004").exists() and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not data.exists() and len(list(staging.glob("0*"))) < 30  # in the middle

    with pytest.raises(DataError, match=r"unfinished import that differs in: recipe.*--restart"):
        import_images(source, data, wanted(recipe=Recipe(32, 64, 2.0)))
    caplog.set_level("INFO")
    import_images(source, data, wanted(), workers=2)
    assert "Continuing after" in caplog.text
    assert hashes(data) == hashes(tmp_path / "whole" / "data")
    assert sorted(path.name for path in data.parent.iterdir()) == ["data"]


def test_restart_discards_an_unfinished_import(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", 6)
    staging = tmp_path / ".import.data"
    (staging / "00007").mkdir(parents=True)
    (staging / "import.json").write_text('{"source": "something else"}')
    with pytest.raises(DataError, match="--restart"):
        import_images(source, tmp_path / "data", wanted())
    import_images(source, tmp_path / "data", wanted(), restart=True)
    import_images(source, tmp_path / "fresh", wanted())
    assert hashes(tmp_path / "data") == hashes(tmp_path / "fresh")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    peaks = []
    for count in (80, 320):
        table = [{"image": image_sets.photo(i, (320, 320)), "text": "Words."} for i in range(count)]
        source, data = tmp_path / f"{count}.parquet", tmp_path / str(count) / "data"
        pq.write_table(pa.Table.from_pylist(table), source, row_group_size=10)
        size = source.stat().st_size
        code = CHILD.replace("wanted()", "wanted(recipe=Recipe(320, 64, 2.0))").replace(
            "import import_images", "import import_images; from vlv.data.import_.recipe import Recipe"
        )
        command = [sys.executable, "-c", code, str(source), str(data)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
        written = sum(path.stat().st_size for path in data.rglob("*.tar"))
    growth = peaks[1] - peaks[0]
    assert written > 40e6 and size > 3e6  # what would be in memory if it were kept
    assert growth < 12e6, f"peak memory {peaks[0] / 1e6:.0f} MB with 80 samples, {peaks[1] / 1e6:.0f} MB with 320"


def test_materialise_accepts_an_import(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", 30)
    manifest = import_images(source, tmp_path / "data", wanted(description="mine")).manifest
    data = tiny().data.model_copy(update={"source": config.ImportedSource(kind="imported", description="mine")})
    data = data.model_copy(update={"shard_size": 10})
    assert sources.materialise(data, config.Paths(tmp_path), tmp_path / "data") == manifest
    other = data.model_copy(update={"image_size": 32})
    with pytest.raises(DataError, match=r"image_size 64, but params\.yaml says 32"):
        sources.materialise(other, config.Paths(tmp_path), tmp_path / "data")


def test_jpeg_takes_less_space_and_the_same_splits(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", 20)
    sizes, splits = [], []
    for encoding in ("png", "jpeg"):
        recipe = Recipe(64, 64, 2.0, cast(Any, encoding))
        import_images(source, tmp_path / encoding, wanted(recipe=recipe, shares=HALVES))
        found = list(samples(tmp_path / encoding))
        splits.append({(split, sample.meta["source"]) for split, sample in found})
        sizes.append(sum(len(sample.image) for _, sample in found))
        assert images.decode(found[0][1].image).shape == (64, 64, 3)
    assert splits[0] == splits[1] and sizes[1] < sizes[0] / 2


def test_import_turns_images_upright(tmp_path: Path) -> None:
    pixels = np.zeros((100, 80, 3), np.uint8)
    pixels[:50] = 255  # white above black
    turned = Image.fromarray(np.rot90(pixels))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    (tmp_path / "photographs").mkdir()
    turned.save(tmp_path / "photographs" / "turned.png", exif=exif)
    import_images(tmp_path / "photographs", tmp_path / "data", wanted())
    [(_, sample)] = samples(tmp_path / "data")
    shown = images.decode(sample.image)
    assert shown[:20].min() > 240
    assert shown[-20:].max() < 15


def test_import_refuses_without_touching_the_data(scene_data: Path, tmp_path: Path) -> None:
    before = hashes(scene_data)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "broken.jpg").write_bytes(b"")
    words = tmp_path / "words.doc"
    words.write_bytes(io.BytesIO(b"no image set").getvalue())
    for source, message in (
        (empty, "none of 1 images"), (scene_data / "train", "overlap"), (tmp_path / "no", "There is no"),
        (words, "--format"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            import_images(source, scene_data, wanted())
    assert hashes(scene_data) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_report_counts_every_sample_once(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photographs", 55)
    (source / "none.png").write_bytes(b"")
    report: ImportReport = import_images(source, tmp_path / "data", wanted())
    counts = report.counts()
    assert counts["found"] == 56 == counts["kept"] + counts["unreadable"]
    assert counts["kept"] == sum(split.samples for split in report.manifest.splits.values())
    assert shards.read_manifest(tmp_path / "data").source["counts"] == report.tally.counts()
