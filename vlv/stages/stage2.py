"""Stage 2: train the captioner on image-caption pairs, on Stage 1's embeddings (arXiv 2507.07104)."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlv.config import Config, Paths
from vlv.data import shards
from vlv.data.cache import ShardCache
from vlv.data.loader import Grouping, ShardLoader, prefetched
from vlv.evaluation import figures
from vlv.models import caption_tokens
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.models.encoder import CaptionEncoder
from vlv.stages import caches, inputs
from vlv.stages.record import Record, training_record
from vlv.training import distributed, loop

_MEASURED = 2000  # samples for a context's mean and std, if not all are computed


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Train on the training pairs."""
    trained = Autoencoder.load(paths.work / "stage1" / "model", paths).encoder  # its decoder is not used
    hashes = inputs.training_hashes("stage2", settings, paths)
    record = Record("stage2", paths, hashes)
    with training_record(record, settings, settings.stage2) as on_log:
        captioner, cut = train_captioner(settings, paths, trained, record.training, hashes.rest, on_log, "Stage 2")
        record.figures["captions_cut"] = cut
        if distributed.is_main():
            captioner.save(record.model, settings, paths, figures.card("captioner", settings))
    return record.result()


def train_captioner(
    settings: Config,
    paths: Paths,
    encoder: CaptionEncoder,
    folder: Path,
    input_hash: str,
    on_log: Callable[[int, dict[str, float]], None],
    title: str,
) -> tuple[Captioner, int]:
    """Run Stage 2 in `folder` on Stage 1's encoder; returns the captioner and how many captions were cut."""
    s = settings.stage2
    device = distributed.join(settings.compute.timeout_minutes)
    captioner = Captioner.build(settings, paths)
    captioner.encoder.load_state_dict(encoder.state_dict())
    captioner.choose(settings.stage1, settings.stage2)
    captioner.to(device)
    loader = _loader(settings, paths, captioner)
    cut = 0

    def batches(step: int) -> Iterator[Stage2Batch]:
        nonlocal cut
        for batch in prefetched(loader.batches(step * s.accumulation), device):
            if any(caption is None for caption in batch.captions):
                key = batch.keys[batch.captions.index(None)]
                raise shards.DataError(f"Sample {key} has no caption; Stage 2 needs one for each image.")
            captions = [caption for caption in batch.captions if caption is not None]
            tokens = caption_tokens.tokenize(captioner.tokenizer, captions, s.max_caption_tokens)
            cut += tokens.cut
            ids, labels = caption_tokens.collate(tokens.ids, captioner.tokenizer.pad_token_id or 0)
            extra = batch.extra
            yield Stage2Batch(extra.get("context"), ids, labels, batch.images, extra.get("features"))

    loop.train(captioner, batches, s, folder, input_hash, on_log, title)
    (all_cut,) = distributed.all_reduce([cut], device)
    return captioner.eval(), int(all_cut)


def _loader(settings: Config, paths: Paths, captioner: Captioner) -> ShardLoader:
    """Training pairs, with the frozen parts' cached outputs for the images where these can be cached."""
    s = settings.stage2
    rank, world_size = distributed.rank(), distributed.world_size()
    entries = shards.read_manifest(paths.data).splits["train"].shards
    by_name = {entry.name: entry for entry in entries}

    def filled(cache: ShardCache, needed: list[shards.ShardEntry]) -> ShardCache:
        cache.fill(needed, rank=rank, world_size=world_size)
        return cache

    kept: ShardCache | None = None
    frozen = not s.trains_encoder
    if frozen or settings.language_model.standardise_context:
        # A trainable encoder's context is needed only once, to measure its mean and std at the start.
        needed = entries if frozen else _first(entries, _MEASURED)
        contexts = filled(caches.contexts(settings, paths, captioner), needed)
        if settings.language_model.standardise_context:
            captioner.prefix.standardise(*contexts.statistics(needed, "context"))
        kept = contexts if frozen else None
    if not frozen and s.cache_features:
        kept = filled(caches.features(settings, paths, captioner.encoder, s.precision), entries)

    tokenizer = copy.deepcopy(captioner.tokenizer)  # batches may be fetched in another thread

    def length(caption: str | None) -> int:
        return len(caption_tokens.tokenize(tokenizer, [caption or ""], s.max_caption_tokens).ids[0])

    return ShardLoader(
        paths.data, "train", distributed.micro_batch_size(s, s.batch_size) * world_size, seed=s.seed, rank=rank,
        world_size=world_size,
        with_images=kept is None, extra=(lambda name: kept.load(by_name[name])) if kept else None,
        grouping=Grouping(length, s.batch_size, s.bucket_window) if s.batching == "bucketed" else None,
    )  # fmt: skip


def _first(entries: list[shards.ShardEntry], samples: int) -> list[shards.ShardEntry]:
    """The fewest whole shards from the start that hold at least `samples` samples."""
    needed: list[shards.ShardEntry] = []
    for entry in entries:
        if sum(chosen.samples for chosen in needed) >= samples:
            break
        needed.append(entry)
    return needed
