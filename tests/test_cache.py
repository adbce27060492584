"""Caches of frozen parts: current files are kept, others computed again or refused, and no disk overfills."""

import logging
import re
from pathlib import Path

import pytest
import torch

from vlv.data import shards
from vlv.data.cache import Compute, ShardCache

MIB = 2**20


class _Half:
    """A frozen part that gives a MiB for each image and counts the images it has seen."""

    seen = 0

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(batch)
        return {"half": (batch.float().mean((1, 2, 3)) / 2)[:, None].repeat(1, MIB // 2)}


@pytest.fixture
def entries(scene_data: Path) -> list[shards.ShardEntry]:
    return shards.read_manifest(scene_data).splits["train"].shards


def _cache(root: Path, data: Path, compute: Compute, part: str = "a") -> ShardCache:
    return ShardCache(root / "cache", "half", {"part": part}, data, "train", compute)


def test_its_size_is_logged_in_advance_and_matches_the_disk(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = _cache(tmp_path, scene_data, _Half())
    with caplog.at_level(logging.INFO):
        cache.fill(entries)
    told = next(float(found[1]) for found in (re.search(r"([0-9.]+) GiB in", m) for m in caplog.messages) if found)
    on_disk = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    assert told * 2**30 == pytest.approx(on_disk, rel=0.1)  # logged with two decimals, 0.05
    assert on_disk == pytest.approx(sum(entry.samples for entry in entries) * MIB, rel=0.01)


def test_only_missing_damaged_or_foreign_files_are_computed(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path
) -> None:
    part = _Half()
    cache = _cache(tmp_path, scene_data, part)
    cache.fill(entries)
    before = [cache.load(entry)["half"].clone() for entry in entries]  # copies: files are mapped, and damaged below
    assert part.seen == sum(entry.samples for entry in entries)
    cache.fill(entries)
    assert part.seen == sum(entry.samples for entry in entries)

    files = sorted(cache.folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].write_bytes(files[2].read_bytes())
    part.seen = 0
    cache.fill(entries)
    assert part.seen == entries[0].samples + entries[1].samples
    assert all(torch.equal(cache.load(entry)["half"], old) for entry, old in zip(entries, before, strict=True))
    assert _cache(tmp_path, scene_data, part, "b").folder != cache.folder


@pytest.mark.parametrize("damage", ["flipped", "zeroed", "of another shard", "gone", "a folder"])
def test_damage_is_found_when_a_file_is_first_opened_and_the_file_is_computed_again(
    damage: str, scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _cache(tmp_path, scene_data, _Half())
    first.fill(entries)
    before = first.load(entries[1])["half"].clone()
    file, other = sorted(first.folder.glob("*.safetensors"))[1:3]
    content = bytearray(file.read_bytes())
    match damage:
        case "flipped":
            content[-1000] ^= 1
            file.write_bytes(content)
        case "zeroed":
            file.write_bytes(content[:-4096] + bytes(4096))
        case "of another shard":
            file.write_bytes(other.read_bytes())
        case "gone":
            file.unlink()
        case "a folder":
            file.unlink()
            file.mkdir()

    part = _Half()
    again = _cache(tmp_path, scene_data, part)  # as the next run opens it
    assert torch.equal(again.load(entries[1])["half"], before)
    assert part.seen == entries[1].samples
    assert any(str(file) in message and "computing it anew" in message for message in caplog.messages)
    assert torch.equal(again.load(entries[0])["half"], first.load(entries[0])["half"])
    assert part.seen == entries[1].samples  # intact files are not computed


def test_a_cache_too_large_for_the_disk_is_not_started(
    scene_data: Path, entries: list[shards.ShardEntry], tmp_path: Path
) -> None:
    def terabytes(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"much": torch.zeros(1, 1, dtype=torch.bfloat16).expand(len(batch), 2**40)}

    cache = ShardCache(tmp_path / "cache", "latents", {}, scene_data, "train", terabytes)
    with pytest.raises(shards.DataError, match=r"latents of 50 samples need 102400.0 GiB.*cache_latents"):
        cache.fill(entries)
    assert not list(cache.folder.glob("*"))
