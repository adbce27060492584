"""Outputs on the test set for the evaluation: of the trained models, the baselines and the upper bounds."""

from collections.abc import Sequence

import torch

from vlv.config import Config, Evaluate, Paths
from vlv.evaluation.metrics import UPPER_BOUND, VAE
from vlv.io import files, images
from vlv.io.images import Pixels
from vlv.io.progress import meter
from vlv.models import saved
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.stages import inputs, stage2
from vlv.training import blocks

RECONSTRUCTION = "reconstruction"


def captions(captioner: Captioner, pixels: Sequence[Pixels], batch_size: int) -> list[str]:
    """The captioner's captions of N images (H, W, 3) uint8."""
    captioner.to(saved.inference_device())
    written: list[str] = []
    with meter("Captions", len(pixels)) as progress:
        for i in range(0, len(pixels), batch_size):
            written += captioner.caption(pixels[i : i + batch_size], batch_size)
            progress.advance(len(written) - i)
    return written


def captions_without_image(settings: Config, paths: Paths, count: int) -> list[str]:
    """A baseline: captions that the pretrained language model samples by itself."""
    alone = Captioner.build(settings, paths).eval().to(saved.inference_device())
    torch.manual_seed(settings.evaluate.seed)
    written: list[str] = []
    while len(written) < count:
        written += alone.write(None, min(settings.evaluate.batch_size, count - len(written)))
    return written


def captions_without_stage1(settings: Config, paths: Paths, pixels: Sequence[Pixels]) -> list[str]:
    """A baseline: captions after the same Stage 2, on an auto-encoder that Stage 1 did not train."""
    untrained = Autoencoder.build(settings, paths).eval()
    hashes = inputs.training_hashes("evaluate", settings, paths)
    input_hash = files.sha256_bytes((inputs.tensor_hash(untrained.encoder) + hashes.input_hash).encode())
    folder = paths.work / "evaluate" / f"untrained-{input_hash[:12]}"
    captioner, _ = stage2.train_captioner(
        settings, paths, untrained.encoder, folder, input_hash, lambda step, values: None, "Baseline: untrained Stage 1"
    )
    return captions(captioner, pixels, settings.evaluate.batch_size)


def pictures(
    model: Autoencoder, e: Evaluate, pixels: Sequence[Pixels], true_captions: Sequence[str | None]
) -> dict[str, list[Pixels]]:
    """Pictures in the decoder's size, (H, W, 3) uint8, of N images (any size), by their source:

    - reconstruction: the caption embeddings of the images.
    - vae: the latents of the images; no diffusion decoder can be more exact.
    - upper_bound: the true captions; left out if an image has none.
    """
    count, size = len(pixels), model.decoder.image_size
    true = [images.resize_crop(p, size) for p in pixels]
    kinds = [RECONSTRUCTION, VAE] + ([UPPER_BOUND] if all(true_captions) else [])
    drawn: dict[str, list[Pixels]] = {kind: [] for kind in kinds}
    with (
        torch.no_grad(),
        blocks.autocast(model.device, "bf16"),
        meter("Reconstructions", count * len(kinds)) as progress,
    ):
        for i in range(0, count, e.batch_size):
            rows = range(i, min(i + e.batch_size, count))
            contexts = {RECONSTRUCTION: model.context(images.to_batch([pixels[row] for row in rows]))}
            if UPPER_BOUND in kinds:
                contexts[UPPER_BOUND] = model.decoder.embed_text([true_captions[row] or "" for row in rows])
            latents = model.decoder.encode(images.to_batch([true[row] for row in rows]))[0]
            drawn[VAE] += images.to_arrays(model.decoder.decode(latents))
            seeds = [e.seed + row for row in rows]
            for kind, context in contexts.items():
                drawn[kind] += images.to_arrays(model.decoder.sample(context.float(), seeds, e.steps, e.guidance))
            progress.advance(len(rows) * len(kinds))
    return drawn
