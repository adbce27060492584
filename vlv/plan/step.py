"""The model and the batch of one training step, with new weights: for a count on fake tensors and for a rehearsal."""

import re
from typing import Literal

import torch

from vlv.config import Config, Paths, Training
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch

StageName = Literal["stage1", "stage2"]
STAGES: tuple[StageName, ...] = ("stage1", "stage2")


def section(settings: Config, stage: StageName) -> Training:
    """Return the stage's section of the configuration."""
    return settings.stage1 if stage == "stage1" else settings.stage2


def samples_in_step(settings: Config, stage: StageName) -> int:
    """Return how many encoded images (Stage 1) or pairs (Stage 2) an optimizer step has, over all processes."""
    if stage == "stage1":
        return settings.stage1.batch_size // settings.stage1.noise_samples_per_image
    return settings.stage2.batch_size


def build(settings: Config, paths: Paths, stage: StageName) -> Autoencoder | Captioner:
    """Build the model that the stage trains, with new weights and its trainable parts set.

    The configuration of each architecture is enough. The encoder's tokenizer may be absent, so the length of the prompt
    is estimated: words, punctuation marks, begin and end.
    """
    new = {"weights": "random"}
    without_weights = settings.model_copy(
        update={
            "encoder": settings.encoder.model_copy(update={**new, "prompt": ""}),
            "decoder": settings.decoder.model_copy(update=new),
            "language_model": settings.language_model.model_copy(update=new),
        }
    )
    model = (Autoencoder if stage == "stage1" else Captioner).build(without_weights, paths)
    model.encoder.prompt_ids = torch.zeros(prompt_length(settings.encoder.prompt), dtype=torch.long)
    # Again, because the word embeddings are trainable only if there is a prompt.
    if isinstance(model, Autoencoder):
        model.encoder.set_trainable(settings.stage1.trained_parts)
    else:
        model.choose(settings.stage1, settings.stage2)
    return model


def prompt_length(prompt: str) -> int:
    """Estimate the tokens of a prompt; 0 for none."""
    return len(re.findall(r"\w+|[^\w\s]", prompt)) + 2 if prompt else 0


@torch.no_grad()
def batch(model: Autoencoder | Captioner, settings: Config, images: torch.Tensor) -> Stage1Batch | Stage2Batch:
    """Make the batch of these images (B, 3, S, S) uint8 that the loader would give.

    Tensors that the configuration caches are computed here, in the caches' bfloat16. The captions of Stage 2 are
    random tokens and have the greatest length that the configuration allows.
    """
    cached: dict[str, torch.Tensor] = {}
    if isinstance(model, Autoencoder):
        one = settings.stage1
        if one.cache_latents:
            cached["latent_mean"], cached["latent_std"] = model.decoder.encode(images)
        if one.cache_features:
            cached["features"] = model.encoder.features(images)
        needed = None if one.cache_latents and one.cache_features else images
        return Stage1Batch(needed, **{name: tensor.bfloat16() for name, tensor in cached.items()})
    two = settings.stage2
    words = model.language_model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(two.seed)
    ids = torch.randint(0, words, (len(images), two.max_caption_tokens), generator=generator)
    if not two.trains_encoder:
        return Stage2Batch(model.context(images).bfloat16(), ids, ids)
    if two.cache_features:
        return Stage2Batch(None, ids, ids, features=model.encoder.features(images).bfloat16())
    return Stage2Batch(None, ids, ids, images)


def cached_bytes(batch: Stage1Batch | Stage2Batch) -> int:
    """Return the bytes that the caches hold for the images of a batch."""
    cached = [batch.features]
    cached += [batch.latent_mean, batch.latent_std] if isinstance(batch, Stage1Batch) else [batch.context]
    return sum(tensor.nbytes for tensor in cached if tensor is not None)
