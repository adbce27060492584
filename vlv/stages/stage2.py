"""Stage 2: train the captioner on image-caption pairs, on Stage 1's embeddings (arXiv 2507.07104)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vlv.config import Config, Paths
from vlv.data import shards, text
from vlv.data.cache import ShardCache
from vlv.data.loader import ShardLoader
from vlv.evaluation import report
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.stages import lineage
from vlv.stages.record import Record, training_record
from vlv.training import loop

_SECTIONS = ["data", "encoder", "decoder", "stage1", "language_model", "stage2"]


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Train on the training pairs."""
    trained = Autoencoder.load(paths.work / "stage1" / "model", paths)
    fingerprint = lineage.fingerprint(settings, paths, _SECTIONS)
    record = Record("stage2", paths, fingerprint)
    with training_record(record, settings, settings.stage2) as on_log:
        captioner, cut = train_captioner(settings, paths, trained, record.training, fingerprint, on_log, "Stage 2")
        record.figures["captions_cut"] = cut
        captioner.save(record.model, settings, paths, report.card("captioner", settings))
    return record.result()


def train_captioner(
    settings: Config,
    paths: Paths,
    autoencoder: Autoencoder,
    folder: Path,
    fingerprint: str,
    on_log: Callable[[int, dict[str, float]], None],
    title: str,
) -> tuple[Captioner, int]:
    """Stage 2 on the given auto-encoder, in `folder`; returns the captioner and how many captions were cut."""
    s = settings.stage2
    captioner = Captioner.build(settings, paths)
    captioner.encoder.load_state_dict(autoencoder.encoder.state_dict())
    captioner.set_learning(s.learn)
    entries = {e.name: e for e in shards.read_manifest(paths.data).splits["train"].shards}
    # The encoder is frozen, so its context is computed once.
    identity = {"encoder": lineage.fingerprint_of(captioner.encoder), "part": lineage.identity(settings.decoder, paths)}
    cache = ShardCache(paths.cache, "context", identity, "train")
    with torch.autocast(autoencoder.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        cache.fill(paths.data, list(entries.values()), lambda x: {"context": captioner.context(x)})
    if settings.language_model.standardise_context:
        captioner.prefix.standardise(*cache.statistics(list(entries.values()), "context"))
    loader = ShardLoader(
        paths.data, "train", s.batch_size // s.accumulation, seed=s.seed, with_images=False,
        extra=lambda name: cache.load(entries[name]),
    )  # fmt: skip
    pad = captioner.tokenizer.pad_token_id or 0
    cut = 0

    def batches(step: int) -> Iterator[Stage2Batch]:
        nonlocal cut
        for batch in loader.batches(step * s.accumulation):
            if any(caption is None for caption in batch.captions):
                key = batch.keys[batch.captions.index(None)]
                raise shards.DataError(f"Sample {key} has no caption; Stage 2 needs one for each image.")
            captions = [caption for caption in batch.captions if caption is not None]
            tokens = text.tokenize(captioner.tokenizer, captions, s.max_caption_tokens)
            cut += tokens.cut
            ids, labels = text.collate(tokens.ids, pad)
            yield Stage2Batch(batch.extra["context"], ids, labels)

    loop.train(captioner, batches, s, folder, fingerprint, on_log, title)
    return captioner.eval(), cut
