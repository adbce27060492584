"""Stage 1: train the auto-encoder on images alone (arXiv 2507.07104)."""

from collections.abc import Iterator
from typing import Any

import torch

from vlv.config import Config, Paths
from vlv.data import shards
from vlv.data.cache import ShardCache
from vlv.data.loader import ShardLoader, prefetched
from vlv.evaluation import figures
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.stages import caches, inputs
from vlv.stages.record import Record, training_record
from vlv.training import distributed, loop


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Train on the training images; captions are never read."""
    device = distributed.join(settings.compute.timeout_minutes)
    model = Autoencoder.build(settings, paths).to(device)
    loader = _loader(settings, paths, model)

    def batches(step: int) -> Iterator[Stage1Batch]:
        for batch in prefetched(loader.batches(step * settings.stage1.accumulation), device):
            extra = batch.extra
            yield Stage1Batch(batch.images, extra.get("features"), extra.get("latent_mean"), extra.get("latent_std"))

    hashes = inputs.training_hashes("stage1", settings, paths)
    record = Record("stage1", paths, hashes)
    with training_record(record, settings, settings.stage1) as on_log:
        loop.train(model, batches, settings.stage1, record.training, hashes.rest, on_log, "Stage 1")
        if distributed.is_main():
            model.save(record.model, settings, paths, figures.card("autoencoder", settings))
    return record.result()


def _loader(settings: Config, paths: Paths, model: Autoencoder) -> ShardLoader:
    """Training images, or the frozen parts' cached outputs for them if the configuration says so."""
    s = settings.stage1
    rank, world_size = distributed.rank(), distributed.world_size()
    images = distributed.micro_batch_size(s, s.batch_size // s.noise_samples_per_image) * world_size
    entries = shards.read_manifest(paths.data).splits["train"].shards
    kept: list[ShardCache] = []
    if s.cache_latents:
        kept.append(caches.latents(settings, paths, model))
    if s.cache_features:
        kept.append(caches.features(settings, paths, model.encoder, s.precision))
    for cache in kept:
        cache.fill(entries, rank=rank, world_size=world_size)
    by_name = {entry.name: entry for entry in entries}

    def extra(name: str) -> dict[str, torch.Tensor]:
        return {key: value for cache in kept for key, value in cache.load(by_name[name]).items()}

    return ShardLoader(
        paths.data, "train", images, seed=s.seed, rank=rank, world_size=world_size,
        with_images=not (s.cache_latents and s.cache_features), extra=extra,
    )  # fmt: skip
