"""Small trainings as the stages run them. test_parallel runs them in one process, and as a program in several."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT, profile
from vlv.config import Paths
from vlv.data.loader import ShardLoader
from vlv.io import files, json_lines
from vlv.io.stopping import Stopped
from vlv.models import caption_tokens
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.training import distributed, launch, loop

STEPS, BATCH = 6, 8


def train(stage: str, data: Path, folder: Path, *, accumulation: int = 1, stop_at: int = -1, **changes: Any) -> None:
    """Train Stage 1 or 2 for 6 steps of 8 images; write its losses and the keys of its samples into `folder`.

    `stop_at`: the last process asks itself to stop in this step. The training saves and leaves.
    """
    smoke = profile("smoke")
    section = getattr(smoke, stage).model_copy(
        update={"steps": STEPS, "batch_size": BATCH, "accumulation": accumulation, "log_every": 1, **changes}
    )
    settings = smoke.model_copy(update={stage: section})
    module: Autoencoder | Captioner = (Autoencoder if stage == "stage1" else Captioner).build(settings, Paths(ROOT))
    images = BATCH // (section.noise_samples_per_image if stage == "stage1" else 1)
    rank, world_size = distributed.rank(), distributed.world_size()
    together = distributed.micro_batch_size(section, images) * world_size
    loader = ShardLoader(data, "train", together, seed=section.seed, rank=rank, world_size=world_size)

    def batches(step: int) -> Iterator[Stage1Batch | Stage2Batch]:
        for count, batch in enumerate(loader.batches(step * accumulation)):
            if step + count // accumulation == stop_at and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            now = {"step": step + count // accumulation, "keys": batch.keys}
            json_lines.append(folder / f"samples-{rank}.jsonl", now)
            if isinstance(module, Autoencoder):
                yield Stage1Batch(batch.images)
            else:
                captions = [caption or "" for caption in batch.captions]
                ids, labels = caption_tokens.collate(caption_tokens.tokenize(module.tokenizer, captions, 64).ids, 0)
                yield Stage2Batch(None, ids, labels, batch.images)

    def on_log(step: int, values: dict[str, float]) -> None:
        json_lines.append(folder / "curve.jsonl", {"step": step, **values})

    try:
        loop.train(module, batches, section, folder, stage, on_log)
    except Stopped:
        return
    if distributed.is_main():
        learned = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        files.write_json(folder / "trained.json", {name: float(p.double().norm()) for name, p in learned.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launch.reporting():
        for job in json.loads(sys.argv[1]):
            train(job.pop("stage"), Path(job.pop("data")), Path(job.pop("folder")), **job)
