"""A bad sample never stops an import: it is dropped with a reason, and the other samples do not change."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import image_sets
from tests.test_data import hashes
from tests.test_import import rows, samples, wanted
from vlv.data.import_.importer import ImportReport, import_images

Member = tuple[str, bytes, dict[str, str]]

_GOOD = 8


def _write(path: Path, members: Iterable[Member]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, pax in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            tar.addfile(info, io.BytesIO(data))


def _good(numbers: Iterable[int]) -> list[Member]:
    return [(f"{i:04d}.{end}", data, {}) for i in numbers for end, data in image_sets.members(i).items()]


def _tars(root: Path, bad: list[Member]) -> Path:
    """Two tars of good samples, with the bad one in the middle of the first."""
    root.mkdir()
    _write(root / "00000.tar", [*_good(range(2)), *bad, *_good(range(2, 4))])
    _write(root / "00001.tar", _good(range(4, _GOOD)))
    return root


def _import_twice(source: Path, data: Path) -> ImportReport:
    """A rerun meets the same sample, and gives the same bytes."""
    report = import_images(source, data, wanted(), workers=1)
    before = hashes(data)
    import_images(source, data, wanted(), workers=2)
    assert hashes(data) == before
    assert len(rows(data)) == report.tally.found
    return report


def _json(text: str) -> list[Member]:
    return [("bad.jpg", image_sets.photo(99), {}), ("bad.json", text.encode(), {})]


_DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"caption": "half \\ud800 a character"}', "caption_unreadable"),
        ('{"captions": ["whole", "half \\udfff"]}', "caption_unreadable"),
        (f'{{"caption": {_DEEP}}}', "caption_unreadable"), (_DEEP, "caption_unreadable"),
        (f'{{"caption": "x", "n": {"9" * 5000}}}', "caption_unreadable"),
        ('{"caption": "x", "url": "https://example.org/\\udfff"}', None),
        ('{"caption": "x", "note": "\\udfff"}', None), ('{"caption": "x", "\\udfff": 1}', None),
        ('{"caption": "x", "score": Infinity, "other": -Infinity, "similarity": NaN, "huge": 1e999}', None),
    ],
)  # fmt: skip
def test_bad_text_loses_at_most_its_own_caption(text: str, reason: str | None, tmp_path: Path) -> None:
    report = _import_twice(_tars(tmp_path / "tars", _json(text)), tmp_path / "data")
    assert report.tally.kept == _GOOD + 1
    assert report.tally.captions_left_out == ({reason: 1} if reason else {})
    [bad] = [sample for _, sample in samples(tmp_path / "data") if not sample.meta["source"].endswith("jpg")]
    assert bad.caption == (None if reason else "x")
    assert not {"score", "other", "similarity", "huge", "note"} & set(bad.meta.get("origin", {}))


def test_names_of_members_that_are_not_utf8(tmp_path: Path) -> None:
    bad = [("caf\udce9.jpg", image_sets.photo(99), {}), ("caf\udce9.txt", b"A caf\xc3\xa9.", {})]
    source = tmp_path / "tars"
    source.mkdir()
    with tarfile.open(source / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, _ in bad:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = _import_twice(source, tmp_path / "data")
    assert report.counts() == {"found": 1, "kept": 1, "with_caption": 1}
    [(_, sample)] = samples(tmp_path / "data")
    assert sample.meta["source"] == "0.tar/caf\N{REPLACEMENT CHARACTER}" and sample.caption == "A café."


@pytest.mark.parametrize(
    "pax",
    [
        {"GNU.sparse.map": "0,10,50,20", "GNU.sparse.size": "99999"},
        {"GNU.sparse.map": "0,10,5,x", "GNU.sparse.size": "99999"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "bad.jpg"},
    ],
)
def test_a_sparse_member_is_dropped(pax: dict[str, str], tmp_path: Path) -> None:
    report = _import_twice(_tars(tmp_path / "tars", [("bad.jpg", image_sets.photo(99), pax)]), tmp_path / "data")
    assert report.tally.kept == report.tally.captions == _GOOD
    assert report.tally.dropped == {"unreadable": 1}


@pytest.mark.parametrize("size", [str(2**70), str(2**63), str(2**40), "-2048", "x"])
def test_a_header_with_a_wrong_size_ends_its_tar_with_a_reason(size: str, tmp_path: Path) -> None:
    """What follows such a header cannot be found; what img2dataset lists and the tar no longer gives is named too."""
    source = _tars(tmp_path / "tars", [("bad.jpg", image_sets.photo(99), {"size": size})])
    keys = ["0000", "0001", "0002", "0003"]
    columns = {"key": keys, "url": keys, "caption": keys, "status": ["success"] * 4, "error_message": [None] * 4}
    pq.write_table(pa.table(columns), source / "00000.parquet")
    report = _import_twice(source, tmp_path / "data")
    assert report.tally.kept == _GOOD - 2
    assert report.tally.dropped == {"damaged_file": 1, "missing_in_tar": 2}


def test_a_header_of_2_to_the_70_bytes(tmp_path: Path) -> None:
    source = _tars(tmp_path / "tars", [])
    info = tarfile.TarInfo("bad.jpg")
    info.size = 2**70
    with tarfile.open(source / "00000.tar") as tar:
        third = tar.getmember("0002.jpg").offset
    with (source / "00000.tar").open("r+b") as stream:
        stream.seek(third)
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
    report = _import_twice(source, tmp_path / "data")
    assert report.tally.dropped == {"damaged_file": 1} and report.tally.kept == _GOOD - 2


def test_columns_with_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.array([b"Good.", b"caf\xe9", b"Good, too."]).cast(pa.binary()).view(pa.string())
    url = pa.array([b"u0", b"u1", b"\xff2"]).view(pa.string())
    table = pa.table({"image": [image_sets.photo(i) for i in range(3)], "caption": broken, "url": url})
    pq.write_table(table, tmp_path / "set.parquet")
    report = _import_twice(tmp_path / "set.parquet", tmp_path / "data")
    assert report.counts() == {"found": 3, "kept": 3, "with_caption": 2, "caption_unreadable": 1}
    assert {sample.meta["source"] for _, sample in samples(tmp_path / "data")} == {
        "u0",
        "u1",
        "\N{REPLACEMENT CHARACTER}2",
    }


def test_a_folder_with_names_and_texts_of_all_kinds(tmp_path: Path) -> None:
    source = image_sets.folder(tmp_path / "photos", 6)
    for number, name in enumerate(("caf\udce9.jpg", "line\nbreak.jpg", "quote'\".jpg")):
        (source / name).write_bytes(image_sets.photo(50 + number))
        (source / name).with_suffix(".json").write_text('{"caption": "x", "n": Infinity}' if number else _DEEP)
    (source / "link.jpg").symlink_to(source / "nowhere.jpg")
    (source / "folder.jpg").mkdir()
    report = _import_twice(source, tmp_path / "data")
    assert report.tally.kept == 9 and report.tally.captions_left_out == {"caption_unreadable": 1}


def test_our_own_shards_with_nan_in_the_json(scene_data: Path, tmp_path: Path) -> None:
    shard = scene_data / "train" / "00000.tar"
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        contents = [(name, stream.read()) for name, stream in members if stream is not None]
    changed = json.loads(contents[-1][1]) | {"scene": {"score": float("inf")}}
    _write(
        shard,
        [*((name, data, {}) for name, data in contents[:-1]), (contents[-1][0], json.dumps(changed).encode(), {})],
    )
    report = _import_twice(scene_data, tmp_path / "again")
    assert report.tally.dropped == {"unreadable": 1}
