"""Caches of frozen parts: what is current is kept, what is not is computed again or refused, and nothing overfills."""

import logging
import re
from pathlib import Path

import pytest
import torch

from vlv.data import shards
from vlv.data.cache import ShardCache

MIB = 2**20


class _Half:
    """A frozen part: a MiB for each image, and how many images it has seen."""

    seen = 0

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(batch)
        return {"half": (batch.float().mean((1, 2, 3)) / 2)[:, None].repeat(1, MIB // 2)}


@pytest.fixture
def entries(scene_data: Path) -> list[shards.ShardEntry]:
    return shards.read_manifest(scene_data).splits["train"].shards


def test_its_size_is_told_before_and_is_the_one_on_the_disk(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", "half", {"part": "a"}, "train")
    with caplog.at_level(logging.INFO):
        cache.fill(scene_data, entries, _Half())
    told = next(float(found[1]) for found in (re.search(r"([0-9.]+) GiB in", m) for m in caplog.messages) if found)
    on_disk = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    assert told * 2**30 == pytest.approx(on_disk, rel=0.1)  # told with two decimals, 0.05
    assert on_disk == pytest.approx(sum(entry.samples for entry in entries) * MIB, rel=0.01)


def test_only_what_is_missing_damaged_or_of_another_shard_is_computed(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path
) -> None:
    cache, part = ShardCache(tmp_path / "cache", "half", {"part": "a"}, "train"), _Half()
    cache.fill(scene_data, entries, part)
    before = [cache.load(entry)["half"].clone() for entry in entries]  # files are mapped, and damaged below
    assert part.seen == sum(entry.samples for entry in entries)
    cache.fill(scene_data, entries, part)
    assert part.seen == sum(entry.samples for entry in entries)

    files = sorted(cache.folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(shards.DataError, match=re.escape(f"{files[1]} does not belong to shard {entries[1].name}")):
        cache.load(entries[1])
    part.seen = 0
    cache.fill(scene_data, entries, part)
    assert part.seen == entries[0].samples + entries[1].samples
    assert all(torch.equal(cache.load(entry)["half"], old) for entry, old in zip(entries, before, strict=True))
    assert ShardCache(tmp_path / "cache", "half", {"part": "b"}, "train").folder != cache.folder


def test_what_the_disk_has_no_room_for_is_not_begun(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", "latents", {}, "train")

    def terabytes(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"much": torch.zeros(1, 1, dtype=torch.bfloat16).expand(len(batch), 2**40)}

    with pytest.raises(shards.DataError, match=r"latents of 50 samples need 102400.0 GiB.*cache_latents"):
        cache.fill(scene_data, entries, terabytes)
    assert not list(cache.folder.glob("*"))
