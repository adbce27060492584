"""Shards on disk and how they are read: webdataset tars, a table of samples and a manifest.

A data folder holds `manifest.json` and for each split a folder with `00000.tar`, `00001.tar` ... and
`samples.parquet`. A sample's key is 5 digits of its shard and 4 of its index. Its members are
`KEY.png` or `KEY.jpg`, `KEY.txt` (the caption; may be absent) and `KEY.json`. webdataset does not notice a
tar that was cut between two members, so each shard is compared with the manifest.
"""

import functools
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlv.config import Section
from vlv.io import files, pin

MANIFEST, TABLE = "manifest.json", "samples.parquet"
REMEDY = "Restore the data with: vlv data download (own images: dvc checkout data.dvc)"


class DataError(RuntimeError):
    """The data is not what its manifest says. The message names the file, the sample and the remedy."""


@dataclass(frozen=True)
class Sample:
    """A sample as it is read. `image` holds encoded bytes, `meta` the content of KEY.json."""

    key: str
    image: bytes
    extension: str
    caption: str | None
    meta: dict[str, Any]


class ShardEntry(Section):
    """What the manifest says about one tar."""

    name: str
    sha256: str
    bytes: int
    samples: int


class SplitEntry(Section):
    """What the manifest says about one split; `table_sha256` is the hash of its samples.parquet."""

    samples: int
    shards: list[ShardEntry]
    table_sha256: str


class Manifest(Section):
    """manifest.json. `source` records what the data was made from; it is compared before the data is made again."""

    format: Literal[1] = 1
    source: dict[str, Any]
    splits: dict[str, SplitEntry]


def read_manifest(data: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = data / MANIFEST
    if not path.exists():
        raise DataError(f"There is no {path}. Make the data with: vlv data download (or: vlv data import FOLDER)")
    try:
        return Manifest.model_validate(files.read_json(path))
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. {REMEDY}") from error


def scan_shard(path: Path) -> Iterator[Sample]:
    """The samples of a tar in file order. The manifest is not read and no image is decoded.

    Raises:
        DataError: the tar is damaged; the samples before the damage have been yielded.
    """
    import webdataset  # imports torch: some seconds that a mere verification does not need

    webdataset.utils.enforce_security = True  # otherwise a name such as "pipe:..." would run a shell
    last = "the start"
    try:
        # We open the file ourselves, so that webdataset never reads a file name as a URL or a pattern.
        with path.open("rb") as stream:
            source = [{"url": str(path), "stream": stream}]
            members = webdataset.tariterators.tar_file_expander(source)
            for raw in webdataset.tariterators.group_by_keys(members):
                sample = _sample(raw, path)
                last = f"sample {sample.key}"
                yield sample
    except FileNotFoundError as error:
        raise DataError(f"Shard {path} is missing. {REMEDY}") from error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        # webdataset appends the stream to the message, and the stream and the URL to the arguments
        reason = str(error.args[0] if error.args else error).partition(" @ ")[0]
        raise DataError(f"Shard {path} is damaged after {last}: {reason}. {REMEDY}") from error


def _sample(raw: dict[str, Any], path: Path) -> Sample:
    from vlv.io import images  # imports torch, as webdataset does

    key = raw["__key__"]
    found = [extension for extension in raw if f".{extension}" in images.SUFFIXES]
    if len(found) != 1:
        raise DataError(f"Shard {path}, sample {key}: {len(found)} images instead of one. {REMEDY}")
    try:
        meta: dict[str, Any] = files.parse_json(raw["json"], "its JSON", "") if "json" in raw else {}
        caption = raw["txt"].decode() if "txt" in raw else None
        if not isinstance(meta, dict):
            raise ValueError("the JSON holds no object")
    except ValueError as error:
        raise DataError(f"Shard {path}, sample {key}: damaged text or JSON ({error}). {REMEDY}") from error
    return Sample(key, raw[found[0]], found[0], caption, meta)


def read_shard(path: Path, expected: ShardEntry) -> list[Sample]:
    """All samples of a shard. The shard is hashed once per process, and again if the file changes.

    Raises:
        DataError: the shard is missing or damaged, or its size, hash or number of samples is not the manifest's.
    """
    _check_shard(path, expected)
    samples = list(scan_shard(path))
    if len(samples) != expected.samples:
        raise DataError(f"Shard {path} has {len(samples)} samples, its manifest says {expected.samples}. {REMEDY}")
    return samples


def _check_shard(path: Path, expected: ShardEntry) -> None:
    if not path.exists():
        raise DataError(f"Shard {path} is missing. {REMEDY}")
    status = path.stat()
    if status.st_size != expected.bytes:
        raise DataError(f"Shard {path} has {status.st_size} bytes, its manifest says {expected.bytes}. {REMEDY}")
    digest = _hash_once(path, status.st_mtime_ns, status.st_ino)
    if digest != expected.sha256:
        raise DataError(f"Shard {path} has sha256 {digest}, its manifest says {expected.sha256}. {REMEDY}")


@functools.cache
def _hash_once(path: Path, _modified: int, _inode: int) -> str:
    return files.sha256_file(path)


def verify(data: Path, pointer: Path | None) -> None:
    """Compare every file with manifest.json and, if `pointer` is given, the whole folder with data.dvc. Only reads.

    Each file is hashed once.

    Raises:
        DataError: names the first shard or table that is missing or differs, a file that does not belong to the data,
            or the folder.
    """
    manifest = read_manifest(data)
    expected: dict[str, str] = {}
    for name, split in manifest.splits.items():
        expected[f"{name}/{TABLE}"] = split.table_sha256
        expected |= {f"{name}/{shard.name}": shard.sha256 for shard in split.shards}
    found = sorted(p.relative_to(data).as_posix() for p in data.rglob("*") if p.is_file())
    missing = sorted(set(expected) - set(found))
    if missing:
        raise DataError(f"{data / missing[0]} is missing ({len(missing)} of {len(expected)} files are). {REMEDY}")
    strange = sorted(set(found) - set(expected) - {MANIFEST})
    if strange:
        raise DataError(f"{data / strange[0]} is not in the manifest. Remove it, or: vlv data download")
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip(found, pool.map(lambda name: pin.hash_file(data / name), found), strict=True))
    for name, digest in expected.items():
        if hashes[name].sha256 != digest:
            raise DataError(f"{data / name} has sha256 {hashes[name].sha256}, its manifest says {digest}. {REMEDY}")
    if pointer is not None:
        problem = pin.difference(pointer, {name: both.md5 for name, both in hashes.items()})
        if problem:
            raise DataError(
                f"{data} is not the version that {pointer} pins: {problem}. {REMEDY}. "
                f"If the change is meant, pin it with: dvc add {data.name}"
            )
