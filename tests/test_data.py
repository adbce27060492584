import itertools
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import small_scenes
from vlv import config
from vlv.data import shards, sources, writer
from vlv.data.loader import ShardLoader
from vlv.data.shards import DataError
from vlv.io import images, pin
from vlv.tiny import scenes


def hashes(data: Path) -> dict[str, str]:
    return {p.relative_to(data).as_posix(): pin.hash_file(p).md5 for p in data.rglob("*") if p.is_file()}


def keys(batches: Any, count: int | None = None) -> list[str]:
    return [key for batch in itertools.islice(batches, count) for key in batch.keys]


# --- scenes


def test_equal_settings_give_equal_bytes(scene_data: Path, paths: config.Paths, tmp_path: Path) -> None:
    sources.materialise(small_scenes(), paths, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(scene_data)


def test_scene_bytes_are_the_known_ones(scene_data: Path) -> None:
    # If you change how scenes are drawn or written, raise vlv.tiny.scene_source.VERSION and update this hash.
    entry = shards.read_manifest(scene_data).splits["validation"].shards[0]
    assert entry.sha256 == "35a6d0f6270e513c0a4c6267f60b6d11c89f09735dc869899cb813260f81753c"


def test_intact_data_is_not_made_again(scene_data: Path, paths: config.Paths) -> None:
    before = {path: path.stat().st_mtime_ns for path in scene_data.rglob("*")}
    sources.materialise(small_scenes(), paths, scene_data)
    assert {path: path.stat().st_mtime_ns for path in scene_data.rglob("*")} == before


def test_damaged_or_outdated_data_is_made_again(scene_data: Path, paths: config.Paths) -> None:
    good = hashes(scene_data)
    (scene_data / "test" / "00000.tar").write_bytes(b"")
    sources.materialise(small_scenes(), paths, scene_data)
    assert hashes(scene_data) == good
    smaller = sources.materialise(small_scenes(train=20), paths, scene_data)
    assert smaller.splits["train"].samples == 20
    assert hashes(scene_data)["train/00000.tar"] == good["train/00000.tar"]  # a smaller count gives the first samples


def test_samples_match_their_specifications(scene_data: Path) -> None:
    specifications: dict[str, set[scenes.Scene]] = {}
    for split, entry in shards.read_manifest(scene_data).splits.items():
        for batch in ShardLoader(scene_data, split, 8).iterate():
            for caption, meta in zip(batch.captions, batch.meta, strict=True):
                scene = scenes.Scene.from_json(meta["scene"])
                specifications.setdefault(split, set()).add(scene)
                assert caption is not None
                assert scenes.read_caption(caption) == scene
                assert scenes.split_of(scene) == split
                assert meta["novel_pair"] == scenes.has_held_out_pair(scene)
        assert len(specifications[split]) == entry.samples  # no duplicates
    table = pd.read_parquet(scene_data / "train" / "samples.parquet")
    assert list(table["key"].iloc[[0, 19, 20, 49]]) == ["000000000", "000000019", "000010000", "000020009"]
    assert set(table["status"]) == {"success"}


def test_tars_are_plain_and_contain_no_traces_of_the_machine(scene_data: Path) -> None:
    with tarfile.open(scene_data / "train" / "00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000000.png", "000000000.txt", "000000000.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


# --- shards against the manifest


def cut_at_member(path: Path) -> None:
    """Cut a tar between two samples, as a full disk does; tar readers do not notice."""
    with tarfile.open(path) as tar:
        offset = next(member.offset for member in tar if member.name == "000000010.png")
    path.write_bytes(path.read_bytes()[:offset])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_at_member, flip, Path.unlink, lambda path: path.write_bytes(b"x" * 99)])
def test_a_damaged_shard_is_named(scene_data: Path, damage: Callable[[Path], Any]) -> None:
    shard = scene_data / "train" / "00000.tar"
    damage(shard)
    entry = shards.read_manifest(scene_data).splits["train"].shards[0]
    for read in (lambda: shards.read_shard(shard, entry), lambda: shards.verify(scene_data, None)):
        with pytest.raises(DataError, match=r"train/00000\.tar.*vlv data download"):
            read()


def test_a_shard_changed_after_it_was_read_is_noticed(scene_data: Path) -> None:
    entry = shards.read_manifest(scene_data).splits["train"].shards[0]
    shard = scene_data / "train" / "00000.tar"
    shards.read_shard(shard, entry)
    flip(shard)
    with pytest.raises(DataError, match="sha256"):
        shards.read_shard(shard, entry)


def test_a_shard_name_never_runs_a_program(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        list(shards.scan_shard(Path(f"pipe:touch {tmp_path / 'ran'}")))
    assert not (tmp_path / "ran").exists()


def test_verify_agrees_with_dvc(scene_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = scene_data.parent
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(project / "site"))
    (scene_data / "train" / "samples.parquet").touch()
    for arguments in (["init", "--no-scm", "--quiet"], ["add", "--quiet", "data"]):
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=project, check=True, capture_output=True)
    data_dvc = project / "data.dvc"
    assert pin.folder_md5(hashes(scene_data)) == pin.pinned_md5(data_dvc)
    before = data_dvc.read_bytes()
    shards.verify(scene_data, data_dvc)

    # Changed together with its manifest: only data.dvc shows it.
    split = scene_data / "validation"
    records = [record("other", i) for i in range(3)]
    shutil.rmtree(split)
    rewrite(scene_data, "validation", records)
    shards.verify(scene_data, None)
    with pytest.raises(DataError, match=r"data\.dvc pins.*validation/00000\.tar.*dvc add data"):
        shards.verify(scene_data, data_dvc)
    assert data_dvc.read_bytes() == before
    with pytest.raises(DataError, match="pins no data"):
        shards.verify(scene_data, project / "none.dvc")


def record(name: str, seed: int, caption: str | None = "A caption of a few words.") -> writer.Record:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return writer.Record(name, images.encode_png(pixels), "png", caption, 64, 64, 64, 64, "RGB")


def rewrite(data: Path, split: str, records: list[writer.Record], shard_size: int = 20) -> None:
    """Rewrite a split with a matching manifest."""
    manifest = shards.read_manifest(data)
    entry = writer.write_split(data / split, records, shard_size)
    writer.write_manifest(data, manifest.model_copy(update={"splits": {**manifest.splits, split: entry}}))


# --- loader


def test_each_epoch_gives_every_sample_once_in_another_order(scene_data: Path) -> None:
    reader = ShardLoader(scene_data, "train", 10, seed=1)
    first, second = keys(reader.batches(), 5), keys(reader.batches(5), 5)
    assert sorted(first) == sorted(second) == keys(reader.iterate())
    assert first != second
    assert first != keys(ShardLoader(scene_data, "train", 10, seed=2).batches(), 5)


def test_a_resumed_loader_continues_with_the_same_samples(scene_data: Path) -> None:
    whole = list(itertools.islice(ShardLoader(scene_data, "train", 7, seed=1).batches(), 20))  # nearly 3 epochs
    for step in (1, 3, 9, 14):
        rest = list(itertools.islice(ShardLoader(scene_data, "train", 7, seed=1).batches(step), 20 - step))
        assert [batch.keys for batch in rest] == [batch.keys for batch in whole[step:]]
        assert [batch.captions for batch in rest] == [batch.captions for batch in whole[step:]]
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[step:], strict=True))


def test_skipped_samples_are_not_read(scene_data: Path) -> None:
    order = [key[:5] for key in keys(ShardLoader(scene_data, "train", 10).batches(), 5)]
    (scene_data / "train" / f"{order[0]}.tar").unlink()
    step = next(i for i in range(5) if order[0] not in order[i * 10 : i * 10 + 10])
    assert next(ShardLoader(scene_data, "train", 10).batches(step)).keys
    with pytest.raises(DataError, match=f"{order[0]}.tar is missing"):
        next(ShardLoader(scene_data, "train", 10).batches())


def test_ranks_share_the_global_batch(scene_data: Path) -> None:
    alone = keys(ShardLoader(scene_data, "train", 8).batches(3), 6)
    ranks = [ShardLoader(scene_data, "train", 8, rank=r, world_size=4).batches(3) for r in range(4)]
    assert [key for _ in range(6) for rank in ranks for key in next(rank).keys] == alone
    with pytest.raises(ValueError, match="cannot be shared by 3"):
        ShardLoader(scene_data, "train", 8, world_size=3)


def test_keeping_shards_in_memory_changes_no_sample(scene_data: Path) -> None:
    runs = [ShardLoader(scene_data, "train", 8, memory=size) for size in (0, 200_000, 1 << 30)]
    batches = [list(itertools.islice(run.batches(), 14)) for run in runs]
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.images, b.images)
    assert batches[0][0].images.shape == (8, 3, 64, 64)
    assert batches[0][0].images.dtype == torch.uint8


def test_extra_rows_follow_their_samples(scene_data: Path) -> None:
    counts = {entry.name: entry.samples for entry in ShardLoader(scene_data, "train", 8).shards}

    def extra(shard: str) -> dict[str, torch.Tensor]:
        return {"key": torch.tensor([int(shard[:5]) * 10_000 + i for i in range(counts[shard])])}

    reader = ShardLoader(scene_data, "train", 8, with_images=False, extra=extra)
    for batch in itertools.islice(reader.batches(), 15):
        assert batch.images is None
        assert [f"{key:09d}" for key in batch.extra["key"].tolist()] == batch.keys
    short = ShardLoader(scene_data, "train", 8, extra=lambda shard: {"key": torch.zeros(3)})
    with pytest.raises(DataError, match="3 rows for"):
        next(short.batches())


def test_a_corrupt_image_is_named_by_shard_and_key(scene_data: Path) -> None:
    records = [record("x", i) for i in range(4)]
    records[2] = writer.Record("x", b"no image", "png", "A caption.")
    shutil.rmtree(scene_data / "test")
    rewrite(scene_data, "test", records)
    with pytest.raises(DataError, match=r"test/00000\.tar: sample 000000002"):
        keys(ShardLoader(scene_data, "test", 4).iterate())
    assert len(keys(ShardLoader(scene_data, "test", 4, with_images=False).iterate())) == 4
    assert keys(ShardLoader(scene_data, "test", 2).iterate(limit=2)) == ["000000000", "000000001"]
    with pytest.raises(DataError, match="'none'"):
        ShardLoader(scene_data, "none", 4)
