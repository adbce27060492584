"""Batches from shards, in an order that is a function of (seed, epoch, shard) alone.

A training that is resumed at some step therefore sees exactly the samples that it would have seen, and the loader
neither reads nor decodes the samples before that step. The order goes through one shard after the other. Each epoch
shuffles the shards, and the samples within each shard, in a new order.

With a `Grouping`, the samples of a window of steps are reordered, so that the samples of one step have similar
lengths. That order is a function of the seed and the window.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlv.data import shards
from vlv.data.shards import DataError, Sample, ShardEntry
from vlv.io import images
from vlv.io.images import Pixels

# Shard name -> tensors whose first dimension counts the shard's samples in file order.
Extra = Callable[[str], dict[str, Tensor]]
_Position = tuple[int, int]  # shard, sample in it


@dataclass(frozen=True)
class Batch:
    """B samples.

    Attributes:
        keys: of the samples, "SSSSSIIII": 5 digits of the shard, 4 of the index.
        images: (B, 3, H, W) uint8; None if the loader reads no images.
        captions: None where a sample has none.
        meta: the JSON of each sample as plain data. It holds the ground truth where the source knows one.
        extra: tensors of B rows, such as cached latents.
    """

    keys: list[str]
    images: Tensor | None
    captions: list[str | None]
    meta: list[dict[str, Any]]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Grouping:
    """Samples of similar length in one step.

    Attributes:
        length: the length of a sample, computed from its caption.
        step_size: samples in one optimizer step, over all ranks and micro-batches. They stay together, however many
            ranks and micro-batches share them.
        window: number of steps whose samples are reordered together.
    """

    length: Callable[[str | None], int]
    step_size: int
    window: int


class _Order:
    """The position of the n-th sample of an endless training. It keeps the order of one epoch and of one shard."""

    def __init__(self, counts: list[int], seed: int) -> None:
        self._counts, self._seed, self._samples = counts, seed, sum(counts)
        self._epoch = -1
        self._turn, self._ends = np.empty(0, np.int64), np.empty(0, np.int64)
        self._inner_of: _Position = (-1, -1)  # epoch, shard
        self._inner = np.empty(0, np.int64)

    def at(self, place: int) -> _Position:
        epoch, within = divmod(place, self._samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._turn = np.random.default_rng([self._seed, epoch]).permutation(len(self._counts))
            self._ends = np.cumsum(np.array(self._counts)[self._turn])
        turn = int(np.searchsorted(self._ends, within, side="right"))
        shard = int(self._turn[turn])
        if (epoch, shard) != self._inner_of:
            self._inner_of = (epoch, shard)
            inner = np.random.default_rng([self._seed, epoch, shard])
            self._inner = inner.permutation(self._counts[shard])
        return shard, int(self._inner[within - (int(self._ends[turn]) - self._counts[shard])])


@dataclass
class _Loaded:
    """A shard in memory. When sample i has been decoded into `pixels[i]`, its encoded bytes are dropped."""

    samples: list[Sample]
    pixels: list[Pixels | None]
    extra: dict[str, Tensor]
    size: int  # bytes held


class ShardLoader:
    """Reads one split of a data folder.

    Args:
        data: the data folder (with manifest.json).
        split: its split.
        batch_size: samples of one global batch, over all ranks; divisible by `world_size`.
        seed: decides the order.
        with_images: if False, no image is decoded and `Batch.images` is None.
        rank, world_size: this rank takes its contiguous part of each global batch.
        grouping: puts samples of similar length together; its `step_size` is a multiple of `batch_size`.
        extra: gives the tensors that are joined, such as cached latents; called once for each shard that is loaded.
        memory: bytes of shards that stay decoded between epochs; the least recently used shard is dropped first. The
            shard in use stays in encoded form whatever its size.

    Raises:
        DataError: no manifest, no such split, an empty split.
    """

    def __init__(
        self,
        data: Path,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        with_images: bool = True,
        rank: int = 0,
        world_size: int = 1,
        grouping: Grouping | None = None,
        extra: Extra | None = None,
        memory: int = 2 << 30,
    ) -> None:
        if batch_size <= 0 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} cannot be shared by {world_size} processes (rank {rank})")
        entry = shards.read_manifest(data).splits.get(split)
        if entry is None or not entry.samples:
            raise DataError(f"{data} has no samples in split {split!r}. {shards.REMEDY}")
        self._folder, self._entries = data / split, entry.shards
        self._batch_size, self._seed, self._with_images = batch_size, seed, with_images
        self._rank, self._world_size, self._grouping = rank, world_size, grouping
        self._extra, self._memory = extra, memory
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()
        self.samples = entry.samples  # in one epoch

    @property
    def shards(self) -> list[ShardEntry]:
        """The split's shards in file order, as in the manifest."""
        return list(self._entries)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless batches from the global batch `start_step` on. A batch may span two shards or two epochs."""
        step = start_step
        local = self._batch_size // self._world_size
        order = _Order([entry.samples for entry in self._entries], self._seed)
        place_of = self._grouped(order, self._grouping) if self._grouping is not None else order.at
        while True:
            first = step * self._batch_size + self._rank * local
            yield self._batch([place_of(place) for place in range(first, first + local)])
            step += 1

    def _grouped(self, order: _Order, grouping: Grouping) -> Callable[[int], _Position]:
        """The order after the samples of each window are reordered; keeps one window."""
        size = grouping.step_size * grouping.window
        held: tuple[int, list[_Position]] = (-1, [])

        def place_of(place: int) -> _Position:
            nonlocal held
            window, within = divmod(place, size)
            if window != held[0]:
                places = [order.at(window * size + i) for i in range(size)]
                captions = [self._load(shard).samples[row].caption for shard, row in places]
                lengths = np.array([grouping.length(caption) for caption in captions])
                by_length = np.argsort(lengths, kind="stable").reshape(grouping.window, grouping.step_size)
                turns = np.random.default_rng([self._seed, window, size]).permutation(grouping.window)
                held = window, [places[i] for i in by_length[turns].ravel()]
            return held[1][within]

        return place_of

    def iterate(self, limit: int | None = None) -> Iterator[Batch]:
        """The split once, in file order, in batches of `batch_size` (the last may be smaller).

        `limit`: the largest number of samples. `rank` is ignored: each rank sees all samples.
        """
        places = ((i, j) for i, entry in enumerate(self._entries) for j in range(entry.samples))
        chosen: list[_Position] = []
        for count, place in enumerate(places):
            if limit is not None and count >= limit:
                break
            chosen.append(place)
            if len(chosen) == self._batch_size:
                yield self._batch(chosen)
                chosen = []
        if chosen:
            yield self._batch(chosen)

    def _batch(self, chosen: list[_Position]) -> Batch:
        keys: list[str] = []
        captions: list[str | None] = []
        meta: list[dict[str, Any]] = []
        pixels: list[Pixels] = []
        extra: dict[str, list[Tensor]] = {}
        for shard, run in groupby(chosen, key=lambda place: place[0]):
            loaded = self._load(shard)
            rows = [row for _, row in run]
            for row in rows:
                sample = loaded.samples[row]
                keys.append(sample.key)
                captions.append(sample.caption)
                meta.append(sample.meta)
                if self._with_images:
                    pixels.append(self._pixels(shard, loaded, row))
            for name, tensor in loaded.extra.items():
                extra.setdefault(name, []).append(tensor[rows])
        joined = {name: torch.cat(parts) for name, parts in extra.items()}
        return Batch(keys, self._stack(pixels, keys) if pixels else None, captions, meta, joined)

    def _stack(self, pixels: list[Pixels], keys: list[str]) -> Tensor:
        odd = next((i for i, one in enumerate(pixels) if one.shape != pixels[0].shape), None)
        if odd is not None:
            raise DataError(
                f"{self._folder}: sample {keys[odd]} is {_size(pixels[odd])} pixels, sample {keys[0]} is "
                f"{_size(pixels[0])}; all images of a split must be of one size. Run: vlv run validate"
            )
        return images.to_batch(pixels)

    def _load(self, shard: int) -> _Loaded:
        if shard in self._loaded:
            self._loaded.move_to_end(shard)
            return self._loaded[shard]
        entry = self._entries[shard]
        samples = shards.read_shard(self._folder / entry.name, entry)
        if not self._with_images:
            samples = [_without_image(sample) for sample in samples]
        extra = self._extra(entry.name) if self._extra is not None else {}
        for name, tensor in extra.items():
            if len(tensor) != entry.samples:
                path = self._folder / entry.name
                raise DataError(f"{name!r} joined to shard {path} has {len(tensor)} rows for {entry.samples} samples")
        size = sum(len(sample.image) for sample in samples) + sum(tensor.nbytes for tensor in extra.values())
        loaded = self._loaded[shard] = _Loaded(samples, [None] * len(samples), extra, size)
        self._make_room(0, shard)
        return loaded

    def _pixels(self, shard: int, loaded: _Loaded, row: int) -> Pixels:
        kept = loaded.pixels[row]
        if kept is not None:
            return kept
        sample = loaded.samples[row]
        try:
            pixels = images.decode(sample.image, f"sample {sample.key}")
        except images.ImageError as error:
            raise DataError(f"Shard {self._folder / self._entries[shard].name}: {error}. {shards.REMEDY}") from error
        if self._make_room(pixels.nbytes, shard):
            loaded.pixels[row], loaded.samples[row] = pixels, _without_image(sample)
            loaded.size += pixels.nbytes - len(sample.image)
        return pixels

    def _make_room(self, needed: int, current: int) -> bool:
        """Drop other shards until `needed` bytes more fit; False if they do not fit even then."""
        total = sum(loaded.size for loaded in self._loaded.values()) + needed
        for shard in list(self._loaded):
            if total <= self._memory:
                break
            if shard != current:
                total -= self._loaded.pop(shard).size
        return total <= self._memory


def _without_image(sample: Sample) -> Sample:
    return Sample(sample.key, b"", sample.extension, sample.caption, sample.meta)


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


T = TypeVar("T")

_AHEAD = 2  # batches; more would only hold memory


def prefetched(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """Yield `items` in their order; for a device other than the CPU, a thread fetches each item in advance.

    A GPU then does not wait for shards to be read and images to be decoded. On a CPU the thread would only take cores
    from the training. An error of `items` is raised where its item would have been yielded.
    """
    if device.type == "cpu":
        yield from items
        return
    end = object()
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        thread.shutdown(cancel_futures=True)
