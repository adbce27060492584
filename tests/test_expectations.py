"""Damaged data fails the right expectation, and the verdict names what failed and where."""

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny
from vlv.data import gate as expectations
from vlv.data import shards, writer
from vlv.data.gate import Verdict
from vlv.data.shards import DataError
from vlv.data.writer import Record
from vlv.io import files

GATE = tiny().data.gate
Edit = Callable[[list[Record]], None]


def records_of(data: Path, split: str) -> list[Record]:
    """A split read back to what it was written from."""
    return [
        Record(
            url=sample.meta["source"], image=sample.image, extension=sample.extension, caption=sample.caption,
            width=sample.meta["width"], height=sample.meta["height"], original_width=64, original_height=64,
            mode="RGB", meta={k: v for k, v in sample.meta.items() if k in ("scene", "novel_pair")},
        )
        for shard in shards.read_manifest(data).splits[split].shards
        for sample in shards.read_shard(data / split / shard.name, shard)
    ]  # fmt: skip


def poison(data: Path, split: str, edit: Edit) -> None:
    """Edit a split's samples and write shards, table and manifest again, so that all of them agree."""
    records = records_of(data, split)
    edit(records)
    shutil.rmtree(data / split)
    entry = writer.write_split(data / split, records, 20)
    manifest = shards.read_manifest(data)
    writer.write_manifest(data, manifest.model_copy(update={"splits": {**manifest.splits, split: entry}}))


def failed(verdict: Verdict) -> set[tuple[str, str]]:
    return {(result.split, result.name) for result in verdict.failures()}


def image(size: tuple[int, int] = (64, 64), mode: str = "RGB", form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=form)
    return buffer.getvalue()


def set_image(size: tuple[int, int] = (64, 64), mode: str = "RGB", form: str = "PNG") -> Edit:
    def edit(records: list[Record]) -> None:
        extension = "jpg" if form == "JPEG" else "png"
        data = image(size, mode, form)
        records[3] = replace(records[3], image=data, width=size[0], height=size[1], extension=extension)

    return edit


def set_caption(caption: str | None) -> Edit:
    def edit(records: list[Record]) -> None:
        records[3] = replace(records[3], caption=caption)

    return edit


def corrupt(records: list[Record]) -> None:
    whole = records[3].image
    assert whole is not None
    records[3] = replace(records[3], image=whole[:200])


def duplicate(records: list[Record]) -> None:
    records[3] = replace(records[3], image=records[1].image)


def wrong_width(records: list[Record]) -> None:
    records[3] = replace(records[3], width=63)


def test_good_data_passes_and_the_summary_says_so(scene_data: Path) -> None:
    verdict = expectations.validate(scene_data, GATE)
    assert verdict.success, verdict.failures()
    assert verdict.samples == {"train": 50, "validation": 6, "test": 14}
    verdict.check()
    assert all(result.checked > 0 and result.unexpected == 0 for result in verdict.results)
    assert expectations.summary_markdown(verdict).startswith("# Data gate: passed")
    files.write_json(scene_data.parent / "validate.json", verdict.model_dump())
    assert Verdict.model_validate(files.read_json(scene_data.parent / "validate.json")) == verdict


@pytest.mark.parametrize(
    ("edit", "names", "found"),
    [
        (corrupt, {"image_decodes"}, "not a readable image"),
        (set_caption(""), {"caption_not_empty", "caption_words"}, "(0)"),
        (set_caption("  \n"), {"caption_not_empty", "caption_words"}, "(0)"),
        (set_caption("word " * 61), {"caption_words"}, "(61)"),
        (set_caption(None), {"caption_present"}, "(None)"),
        (set_image((96, 96)), {"image_width", "image_height"}, "(96)"),
        (set_image((32, 32)), {"image_width", "image_height", "image_min_side"}, "(32)"),
        (set_image((64, 160)), {"image_height", "image_aspect"}, "(2.5)"),
        (set_image(mode="L"), {"image_mode"}, "(L)"),
        (set_image(mode="CMYK", form="JPEG"), {"image_mode"}, "(CMYK)"),
        (set_image(mode="RGBA"), {"image_mode"}, "(RGBA)"),
        (duplicate, {"no_duplicates"}, "(train/00000.tar sample 000000001)"),
        (wrong_width, {"json_width"}, "(64, not 63)"),
    ],
)  # fmt: skip
def test_a_poisoned_sample_is_named(scene_data: Path, edit: Edit, names: set[str], found: str) -> None:
    poison(scene_data, "train", edit)
    shards.verify(scene_data, None)  # the manifest agrees: only the gate can tell
    verdict = expectations.validate(scene_data, GATE, ["train"])
    assert not verdict.success
    assert failed(verdict) == {("train", name) for name in names}
    for result in verdict.failures():
        assert [example.where for example in result.examples] == ["train/00000.tar sample 000000003"]
    with pytest.raises(DataError) as caught:
        verdict.check()
    assert found in str(caught.value)
    assert "train/00000.tar sample 000000003" in str(caught.value)
    assert found in expectations.summary_markdown(verdict)


def cut_in_sample(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])


def cut_at_member(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        offset = next(member.offset for member in tar if member.name == "000010015.png")
    shard.write_bytes(shard.read_bytes()[:offset])


def flip_in_image(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        offset = tar.getmember("000010003.png").offset_data
    content = bytearray(shard.read_bytes())
    content[offset + 60] ^= 16
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (cut_in_sample, {"file_size", "file_hash", "file_is_readable", "sample_count"}),
        (cut_at_member, {"file_size", "file_hash", "sample_count"}),
        (flip_in_image, {"file_hash", "image_decodes", "json_hash", "table_hash"}),
        (lambda shard: shard.write_bytes(b""), {"file_size", "file_hash", "file_is_readable", "sample_count"}),
        (Path.unlink, {"file_exists"}),
        (lambda shard: shutil.copy(shard, shard.with_name("00009.tar")), {"file_is_listed"}),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named_and_the_rest_is_still_checked(
    scene_data: Path, damage: Callable[[Path], object], names: set[str]
) -> None:
    poison(scene_data, "train", set_caption("Short."))
    damage(scene_data / "train" / "00001.tar")
    verdict = expectations.validate(scene_data, GATE, ["train"])
    assert failed(verdict) == {("train", name) for name in names | {"caption_words"}}
    places = {result.name: result.examples[0].where for result in verdict.failures()}
    assert places.pop("caption_words") == "train/00000.tar sample 000000003"
    damaged = "train/00009.tar" if names == {"file_is_listed"} else "train/00001.tar"
    assert all(place.startswith(damaged) for place in places.values())


def test_overlap_of_test_and_train_is_named(scene_data: Path) -> None:
    train = records_of(scene_data, "train")

    def leak(records: list[Record]) -> None:
        records[5] = replace(train[25], url="leak")  # the same picture
        records[6] = replace(records[6], meta=train[26].meta)  # another picture of the same specification

    poison(scene_data, "test", leak)
    verdict = expectations.validate(scene_data, GATE)
    messages = {result.name: result.message for result in verdict.failures()}
    assert set(messages) == {"no_image_overlap", "no_scene_overlap"}
    assert "test/00000.tar sample 000000005 (train/00001.tar sample 000010005)" in messages["no_image_overlap"]
    assert "test/00000.tar sample 000000006 (train/00001.tar sample 000010006)" in messages["no_scene_overlap"]


def test_a_table_that_disagrees_is_named(scene_data: Path) -> None:
    shutil.copy(scene_data / "test" / "samples.parquet", scene_data / "validation" / "samples.parquet")
    (scene_data / "test" / "samples.parquet").write_bytes(b"PAR1 no table PAR1")
    verdict = expectations.validate(scene_data, GATE)
    found = failed(verdict)
    assert {("validation", "file_hash"), ("validation", "sample_count"), ("validation", "table_hash")} <= found
    assert {("test", "file_is_readable"), ("test", "table_has_sample")} <= found
    assert not {name for split, name in found if split == "train"}


def test_the_configuration_sets_the_bounds_of_the_gate(scene_data: Path) -> None:
    poison(scene_data, "train", duplicate)
    poison(scene_data, "validation", set_caption(None))
    loose = GATE.model_copy(update={"max_duplicate_share": 0.02, "captions_required": False})
    assert expectations.validate(scene_data, loose).success
    tight = loose.model_copy(update={"max_duplicate_share": 0.019})
    assert failed(expectations.validate(scene_data, tight)) == {("train", "no_duplicates")}


def test_data_without_manifest_or_split_is_a_verdict(scene_data: Path) -> None:
    shutil.rmtree(scene_data / "test")
    poison_free = shards.read_manifest(scene_data)
    splits = {name: entry for name, entry in poison_free.splits.items() if name != "test"}
    writer.write_manifest(scene_data, poison_free.model_copy(update={"splits": splits}))
    verdict = expectations.validate(scene_data, GATE, ["train", "test"])
    assert failed(verdict) == {("test", "split_is_there")}
    (scene_data / "manifest.json").write_text('{"format": 1, "splits"')
    verdict = expectations.validate(scene_data, GATE)
    assert failed(verdict) == {("", "manifest_is_readable")}
    assert "manifest.json" in verdict.failures()[0].message
    assert "FAILED" in expectations.summary_markdown(verdict)
