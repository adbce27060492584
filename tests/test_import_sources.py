"""What a source says about its images: where captions come from, and that the import stops if none are found."""

import io
import json
import shutil
import sys
import tarfile
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import image_sets
from tests.conftest import ROOT
from tests.test_import import contents, rows, samples, wanted
from vlv.cli.data import importing
from vlv.data.import_.importer import import_images
from vlv.data.readers import folder, formats
from vlv.data.readers.formats import ReadOptions
from vlv.data.shards import DataError
from vlv.io import files


def _captions(data: Path) -> set[str | None]:
    return {caption for _, caption in contents(data).values()}


@pytest.mark.parametrize("name", ["captions.csv", "labels.json", "all.jsonl", "deep/captions.txt", "set.parquet"])
def test_a_folder_with_an_unread_list_stops_the_import(name: str, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    image_sets.pictures(source, range(4))
    (source / "README.txt").write_text("Photographs.")
    (source / "LICENSE.txt").write_text("Free.")
    import_images(source, tmp_path / "data", wanted())  # files about the folder are not lists
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("file,caption\n")
    before = contents(tmp_path / "data")
    with pytest.raises(
        DataError, match=rf"holds {name}, but no image .*import \S*{name}( --format table)?\. .*--caption-column none"
    ):
        import_images(source, tmp_path / "data", wanted())
    assert contents(tmp_path / "data") == before and not (tmp_path / ".import.data").exists()
    report = import_images(source, tmp_path / "data", wanted(reading=ReadOptions(caption_column="none")))
    assert report.counts() == {"found": 4, "kept": 4, "with_caption": 0}
    made = [{"sha256": files.sha256_bytes(image_sets.photo(0)), "caption": "Made elsewhere."}]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "made.parquet")
    assert import_images(source, tmp_path / "data", wanted(captions=tmp_path / "made.parquet")).tally.captions == 1
    assert "Made elsewhere." in _captions(tmp_path / "data")
    (source / "photo0001.txt").write_text("One that is beside its image.")
    assert import_images(source, tmp_path / "data", wanted()).tally.captions == 1


@pytest.mark.parametrize("name", ["captions.json", "lists/a.csv", "results.txt"])
def test_the_command_in_the_error_imports_the_captions(name: str, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    listed = image_sets.pictures(source / "images", range(4))
    (source / name).parent.mkdir(exist_ok=True)
    rows = ["image,caption\n", *(f"images/{image},{text}\n" for image, text in listed)]
    (source / name).write_text(json.dumps(dict(listed)) if name.endswith("json") else "".join(rows))
    with pytest.raises(DataError, match=r"vlv data import ") as error:
        import_images(source, tmp_path / "data", wanted())
    command = str(error.value).partition("vlv data import ")[2].partition(". If there")[0].split()
    assert command == [str(source / name), *(["--format", "table"] if name.endswith("txt") else [])]
    reading = ReadOptions(format="table" if name.endswith("txt") else None)
    assert import_images(Path(command[0]), tmp_path / "data", wanted(reading=reading)).tally.captions == 4


def test_only_unusable_captions_stop_the_import(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photos", 6)
    for path in source.rglob("*"):
        if path.suffix in (".txt", ".caption", ".json"):
            path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"6 images, but not one caption .*'caption_unreadable': 6.*photo\d+\.jpg"):
        import_images(source, tmp_path / "data", wanted())
    assert not (tmp_path / "data").exists() and not (tmp_path / ".import.data").exists()
    table = {"image": [image_sets.photo(i) for i in range(3)], "caption": pa.array([None] * 3, pa.string())}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    with pytest.raises(DataError, match=r"not one caption .*column caption has none.*--caption-column none"):
        import_images(tmp_path / "set.parquet", tmp_path / "data", wanted())
    reading = ReadOptions(caption_column="none")
    assert import_images(tmp_path / "set.parquet", tmp_path / "data", wanted(reading=reading)).tally.kept == 3


def test_an_unsorted_tar_stops_the_import(tmp_path: Path) -> None:
    """As `tar` writes a folder: in the order of the file system, so that captions do not follow their images."""
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        for end in ("jpg", "txt", "json"):
            for number in range(4):
                data = image_sets.members(number)[end]
                info = tarfile.TarInfo(f"photos/{number}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"4 images, but not one caption .*'image_missing': 8.*tar --sort=name"):
        import_images(tmp_path / "photos.tar.gz", tmp_path / "data", wanted())
    assert not (tmp_path / "data").exists()


def test_images_in_another_folder_stop_the_import(tmp_path: Path) -> None:
    source = image_sets.json_lines(tmp_path / "set", 5)
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    source.parent.mkdir()
    shutil.move(tmp_path / "elsewhere" / "set.jsonl", source)
    with pytest.raises(DataError, match=r"none of 5 images can be used \{'image_missing': 5\}.*--images FOLDER"):
        import_images(source, tmp_path / "data", wanted())
    reading = ReadOptions(images=tmp_path / "elsewhere")
    assert import_images(source, tmp_path / "data", wanted(reading=reading)).tally.captions == 5


def test_lines_without_an_image_do_not_affect_other_lines(tmp_path: Path) -> None:
    listed = image_sets.pictures(tmp_path / "set", range(3))
    lines = [json.dumps({"image": name, "caption": text}) for name, text in listed]
    lines[1:1] = [
        "{not json", "[1, 2]", "", '{"caption": "no image"}', '{"image": "gone.jpg", "caption": "x"}',
        '{"image": "../secret.jpg", "caption": "x"}', '{"image": "/etc/hostname", "caption": "x"}',
        '{"image": "\\ud800.jpg", "caption": "x"}', '{"image": "\\u0000.jpg", "caption": "x"}',
        '{"image": "' + "n" * 5000 + '.jpg", "caption": "x"}', "[" * 100_000,
    ]  # fmt: skip
    (tmp_path / "secret.jpg").write_bytes(image_sets.photo(9))
    source = tmp_path / "set" / "list.jsonl"
    source.write_text("\n".join(lines))
    report = import_images(source, tmp_path / "data", wanted())
    assert report.tally.captions == report.tally.kept == 3
    assert report.tally.dropped == {"unreadable": 3, "image_missing": 5, "outside_folder": 2}
    assert len(rows(tmp_path / "data")) == report.tally.found == 13
    assert ("list.jsonl:2", "unreadable") in {(note.path, note.reason) for note in report.notes}


def test_a_table_in_another_encoding_loses_only_bad_lines(tmp_path: Path) -> None:
    image_sets.pictures(tmp_path / "set", range(2))
    (tmp_path / "set" / "ä.jpg".encode("latin-1").decode("utf-8", "surrogateescape")).write_bytes(image_sets.photo(2))
    text = "image\tcaption\nphoto0000.jpg\tA café.\nphoto0001.jpg\tA bar.\nä.jpg\tA wine cellar.\n"
    (tmp_path / "set" / "list.tsv").write_bytes(text.encode("latin-1"))
    report = import_images(tmp_path / "set" / "list.tsv", tmp_path / "data", wanted())
    assert _captions(tmp_path / "data") == {None, "A bar.", "A wine cellar."}  # the file's name is its bytes
    assert report.tally.captions_left_out == {"caption_unreadable": 1}


def test_several_lines_about_one_image_are_several_captions(tmp_path: Path) -> None:
    listed = image_sets.pictures(tmp_path / "flickr", range(6))
    lines = [f"{name}| {number}| {text} {number}\n" for name, text in listed for number in range(5)]
    (tmp_path / "flickr" / "results.csv").write_text("image_name| comment_number| comment\n" + "".join(lines))
    source = tmp_path / "flickr" / "results.csv"
    with pytest.raises(DataError, match=r"--caption-column NAME.*image_name, comment_number, comment"):
        import_images(source, tmp_path / "data", wanted())
    reading = ReadOptions(caption_column="comment", rule="first")
    assert import_images(source, tmp_path / "data", wanted(reading=reading)).tally.captions == 6
    assert _captions(tmp_path / "data") == {f"{text} 0" for _, text in listed}
    assert all(len(sample.meta["captions"]) == 4 for _, sample in samples(tmp_path / "data"))


def test_columns_can_be_named_and_are_listed(tmp_path: Path) -> None:
    listed = image_sets.pictures(tmp_path / "set", range(3))
    source = tmp_path / "set" / "list.csv"
    source.write_text("photo,alt,caption\n" + "".join(f"{name},{text},wrong\n" for name, text in listed))
    with pytest.raises(DataError, match=r"--image-column.*photo, alt, caption"):
        import_images(source, tmp_path / "data", wanted())
    with pytest.raises(DataError, match=r"no column 'nope'.*photo, alt, caption"):
        import_images(source, tmp_path / "data", wanted(reading=ReadOptions(image_column="nope")))
    reading = ReadOptions(image_column="photo", caption_column="alt")
    import_images(source, tmp_path / "data", wanted(reading=reading))
    assert _captions(tmp_path / "data") == {text for _, text in listed}
    reading = ReadOptions(image_column="photo", caption_column="none")
    assert import_images(source, tmp_path / "data", wanted(reading=reading)).counts()["with_caption"] == 0


def test_answers_to_several_questions_are_not_a_caption(tmp_path: Path) -> None:
    source = image_sets.llava_file(tmp_path / "llava", 3)
    value = json.loads(source.read_text())
    value[0]["conversations"] *= 2
    value.append({"id": "text only", "conversations": value[1]["conversations"]})
    source.write_text(json.dumps(value))
    report = import_images(source, tmp_path / "data", wanted())
    assert report.counts() == {"found": 4, "kept": 3, "with_caption": 2, "caption_unreadable": 1, "image_missing": 1}
    detail = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "In detail."}]
    source.write_text(
        json.dumps([*value, value[0] | {"conversations": detail}, {**value[0], "conversations": [3, None]}])
    )
    assert import_images(source, tmp_path / "data", wanted()).tally.captions == 3  # several lines about one image
    assert "In detail." in _captions(tmp_path / "data")


def test_an_imagefolder_keeps_unlisted_images_and_reports_missing_ones(tmp_path: Path) -> None:
    source = image_sets.imagefolder(tmp_path / "set", 9)
    (source / "train" / "extra.png").write_bytes(image_sets.photo(20))
    (source / "test" / "photo0008.jpg").unlink()
    report = import_images(source, tmp_path / "data", wanted())
    assert report.counts() == {"found": 10, "kept": 9, "with_caption": 8, "caption_missing": 1, "image_missing": 1}
    assert {note.path for note in report.notes} == {"train/extra.png", "test/photo0008.jpg"}
    assert any(sample.meta.get("origin") == {"score": "0.5"} for _, sample in samples(tmp_path / "data"))


def test_a_coco_folder_with_half_of_its_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = image_sets.coco_folder(tmp_path / "coco", 8)
    shutil.rmtree(source / "train2017")
    assert formats.guess(source) == "coco"
    assert import_images(source, tmp_path / "data", wanted()).tally.captions == 4
    assert "captions_train2017.json is left out" in caplog.text
    shutil.move(source / "val2017", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no captions file .*--images FOLDER"):
        import_images(source, tmp_path / "data", wanted())
    reading = ReadOptions(images=tmp_path / "elsewhere")
    file = source / "annotations" / "captions_val2017.json"
    assert import_images(file, tmp_path / "data", wanted(reading=reading)).tally.captions == 4
    with pytest.raises(DataError, match=r"captions_val2017\.json: its images are not .*--images FOLDER"):
        import_images(file, tmp_path / "data", wanted())


def test_faults_in_two_tables_of_the_same_name_are_counted_twice(tmp_path: Path) -> None:
    source = image_sets.imagefolder(tmp_path / "set", 6)
    shutil.copy(source / "train" / "metadata.csv", source / "test" / "metadata.csv")
    for split in ("train", "test"):
        with (source / split / "metadata.csv").open("a") as stream:
            stream.write(",no name,\n")
    report = import_images(source, tmp_path / "data", wanted())
    missing = {note.path for note in report.notes if "names no image" in note.message}
    assert missing == {"train/metadata.csv:4", "test/metadata.csv:4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("[]", "names no image"),
        ("3", "cannot be read"),
        ("[" * 100_000, "cannot be"),
    ],
)
def test_a_file_that_is_not_a_list_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=rf"list\.json {message}"):
        import_images(tmp_path / "list.json", tmp_path / "data", wanted())


def test_a_cut_arrow_file_gives_its_samples_before_the_cut(tmp_path: Path) -> None:
    source = image_sets.saved_to_disk(tmp_path / "saved", 20)
    cut = source / "train" / "data-00000-of-00001.arrow"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 3 // 4])
    report = import_images(source, tmp_path / "data", wanted())
    assert report.tally.captions == 15 and report.tally.dropped == {"damaged_file": 1}
    cut.unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow is missing, but .*state\.json lists it"):
        import_images(source, tmp_path / "data", wanted())


def test_two_files_of_conversations_are_not_guessed_as_llava(tmp_path: Path) -> None:
    source = image_sets.llava(tmp_path / "llava", 3)
    shutil.copy(source / "blip_laion_cc_sbu_558k.json", source / "other.json")
    assert formats.guess(source) == "folder"
    with pytest.raises(DataError, match=r"holds blip_laion_cc_sbu_558k\.json"):
        import_images(source, tmp_path / "data", wanted())


def test_a_new_format_is_one_module_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vlv.data.readers.toy")
    made = folder.FolderReader(image_sets.folder(tmp_path / "set", 3), tmp_path / "scratch", 0, "first")
    vars(module).update(
        recognises=lambda format, source, inside: source.suffix == ".toy", open_reader=lambda *arguments: made
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(formats, "FORMATS", {"toy": "toy", **formats.FORMATS})
    (tmp_path / "set.toy").write_text("")
    assert formats.guess(tmp_path / "set.toy") == "toy"
    reader = formats.open_source(tmp_path / "set.toy", tmp_path, ReadOptions())
    assert len(list(reader.read())) == 3


def test_every_format_is_in_the_help_and_in_the_docs() -> None:
    docs = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name in formats.FORMATS:
        assert f"[bold]{name}[/]:" in importing.HELP and f"\n| `{name}` |" in docs, name
