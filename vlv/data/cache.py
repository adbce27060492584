"""Tensors of frozen parts, computed once for each shard and kept on disk.

A cache's folder is named by the hash of everything that decides its contents (the part's weights, its input
size, the code that computes them, the libraries), and each file carries the hashes of its shard and of its own
tensors: a stale, foreign or damaged tensor is never used.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from vlv.data import shards
from vlv.data.shards import ShardEntry
from vlv.io import files, images
from vlv.io.progress import meter

log = logging.getLogger(__name__)

Compute = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]

_GIB = 2**30
_POLL_SECONDS = 0.5
_GIVE_UP_SECONDS = 3600.0  # without a new shard from any other process


class ShardCache:
    """Cached tensors of one split.

    Args:
        root: folder of all caches.
        kind: what is cached ("latents"); the first part of the folder's name.
        inputs: everything that decides the contents, except the shard itself; their hash names the folder.
        data, split: the split of the data folder that is read.
        compute: maps images (B, 3, H, W) uint8 to named tensors (B, ...), which are kept in bfloat16.
        batch_size: B.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        inputs: Mapping[str, str],
        data: Path,
        split: str,
        compute: Compute,
        batch_size: int = 100,
    ) -> None:
        digest = files.sha256_bytes(json.dumps(inputs, sort_keys=True).encode())
        self.folder = root / f"{kind}-{digest[:16]}" / split
        self.kind, self._data, self._split = kind, data, split
        self._compute, self._batch_size = compute, batch_size
        self._verified: set[str] = set()  # shards whose tensors this process has compared with their hash

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{Path(entry.name).stem}.safetensors"

    def _is_current(self, entry: ShardEntry) -> bool:
        """Whether there is a complete file for this shard; its tensors are compared when they are loaded."""
        path = self._path(entry)
        if path.is_dir():
            files.set_aside(path, f"{path} is a folder where a file should be.", "the file is computed anew")
        if not path.exists():
            return False
        try:
            with safetensors.safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("shard_sha256") == entry.sha256
        except safetensors.SafetensorError:
            log.warning("%s is damaged; computing it anew", path)
            return False
        except OSError as error:  # safetensors does not name the file
            raise files.FileError(f"{path} cannot be read ({error}). Remove it and run the command again.") from error

    def fill(self, entries: list[ShardEntry], *, rank: int = 0, world_size: int = 1) -> None:
        """Compute what is missing.

        A kill costs at most the shard in work. Each of `world_size` processes computes its share of the shards,
        then waits for the others'.

        Raises:
            DataError: the others finish no shard for an hour, or the disk has no room for what is missing.
        """
        missing = [entry for entry in entries if not self._is_current(entry)]
        names = {entry.name for entry in missing}
        mine = [entry for entry in entries[rank::world_size] if entry.name in names]
        if mine:
            self._make(mine, sum(entry.samples for entry in missing))
        if world_size > 1:
            self._wait(entries)

    def _make(self, entries: list[ShardEntry], missing: int) -> None:
        announced = False
        with meter(f"Caching {self.kind} of {self._split}", sum(e.samples for e in entries)) as progress:
            for entry in entries:
                samples = shards.read_shard(self._data / self._split / entry.name, entry)
                parts: list[Mapping[str, torch.Tensor]] = []
                for i in range(0, len(samples), self._batch_size):
                    pixels = [
                        images.decode(s.image, f"shard {entry.name}, sample {s.key}")
                        for s in samples[i : i + self._batch_size]
                    ]
                    with torch.no_grad():
                        computed = self._compute(images.to_batch(pixels))
                    parts.append({name: t.to("cpu", torch.bfloat16) for name, t in computed.items()})
                    if not announced:
                        self._announce(sum(t.nbytes for t in parts[0].values()) / len(pixels), missing)
                        announced = True
                    progress.advance(len(pixels))
                joined = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                marks = {"shard_sha256": entry.sha256, "tensors_sha256": _tensors_sha256(joined)}
                with files.atomic_path(self._path(entry)) as temporary:
                    safetensors.torch.save_file(joined, temporary, metadata=marks)

    def _announce(self, sample: float, missing: int) -> None:
        """Log the disk space that the `missing` samples of all processes will take, at `sample` bytes each.

        Raises:
            DataError: more than is free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = sample * missing / _GIB, shutil.disk_usage(self.folder).free / _GIB
        log.info("%s of %s: %.2f GiB in %s (%.1f free)", self.kind, self._split, needed, self.folder, free)
        if needed > free:
            raise shards.DataError(
                f"The {self.kind} of {missing} samples need {needed:.1f} GiB in {self.folder}; {free:.1f} are free. "
                "Make room, set VLV_CACHE to a folder on a larger disk, or keep less (cache_latents, cache_features in "
                "params.yaml)."
            )

    def _wait(self, entries: list[ShardEntry]) -> None:
        missing, last = entries, time.monotonic()
        while True:
            left = [entry for entry in missing if not self._is_current(entry)]
            if not left:
                return
            if len(left) < len(missing):
                missing, last = left, time.monotonic()
            if time.monotonic() - last > _GIVE_UP_SECONDS:
                raise shards.DataError(
                    f"{self._path(left[0])} and {len(left) - 1} more were left to other processes, which finished none "
                    f"for an hour. All machines need this folder on a file system they share."
                )
            time.sleep(_POLL_SECONDS)

    def load(self, entry: ShardEntry) -> dict[str, torch.Tensor]:
        """The tensors of one shard, in file order.

        This process compares them with their hash when it first loads them. Missing or damaged tensors are computed
        again, with a warning.
        """
        path = self._path(entry)
        if entry.name not in self._verified:
            if not self._is_current(entry) or not self._is_whole(path):
                log.warning("%s is missing or damaged; computing it anew", path)
                self._make([entry], entry.samples)
            self._verified.add(entry.name)
        return safetensors.torch.load_file(path)

    def _is_whole(self, path: Path) -> bool:
        with safetensors.safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("tensors_sha256")
        return _tensors_sha256(safetensors.torch.load_file(path)) == expected

    def statistics(self, entries: list[ShardEntry], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a cached tensor over all samples, each of one sample's shape, float32."""
        count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for entry in entries:
            values = self.load(entry)[name].double()
            count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()


def _tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
