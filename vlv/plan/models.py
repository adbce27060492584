"""The configured models at full size, without their numbers."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv.config import Config, Paths, Precision, Stage1, Training
from vlv.models import language_model
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Prefix
from vlv.models.encoder import CaptionEncoder
from vlv.plan.stand_ins import Target, like, on_target, stand_in
from vlv.training import blocks


def without_weights(settings: Config) -> Config:
    """The same architectures with new weights; no word of a tokenizer is needed to build them."""
    random = {"weights": "random"}
    return settings.model_copy(
        update={
            "encoder": settings.encoder.model_copy(update={**random, "prompt": ""}),
            "decoder": settings.decoder.model_copy(update=random),
            "language_model": settings.language_model.model_copy(update=random),
        }
    )


def set_prompt(encoder: CaptionEncoder, prompt: str) -> None:
    """Give an encoder that was built without its tokenizer a prompt of about the right length."""
    encoder.prompt_ids = torch.zeros(prompt_length(prompt), dtype=torch.long)


def autoencoder(
    settings: Config, paths: Paths, mode: FakeTensorMode, target: Target, training: Training
) -> Autoencoder:
    """Stage 1's model, as `training` uses it: Stage 1 teaches its encoder, Stage 2 by choice.

    Weights are not read: the architectures' configurations are enough.

    The prompt's length is estimated (words and punctuation marks, begin and end), as the tokenizer may not be at hand.
    """
    with torch.device("meta"):
        model = Autoencoder.build(without_weights(settings), paths)
        set_prompt(model.encoder, settings.encoder.prompt)
    if isinstance(training, Stage1) or settings.stage2.learn == "mlp+llm+encoder":
        queries = isinstance(training, Stage1) or settings.stage2.queries_learn
        model.encoder.set_learning(settings.stage1.learn, queries=queries)
    else:
        model.requires_grad_(False)
    _store_frozen(model, training)
    _attend(model.encoder.florence, target)
    for text_encoder in text_encoders(model.decoder.conditioner):
        _attend(text_encoder, target)
    model.decoder.use_fused_attention(target == "gpu")
    stand_in(model, mode)
    for name in ("alphas_cumprod", "sigmas", "timesteps"):
        if (table := getattr(model.decoder.scheduler, name, None)) is not None:
            setattr(model.decoder.scheduler, name, like(table, mode))
    return model


def text_encoders(conditioner: nn.Module) -> list[PreTrainedModel]:
    """All text encoders of a text side."""
    return [part for part in conditioner.modules() if isinstance(part, PreTrainedModel)]


def language_side(
    settings: Config, paths: Paths, context_width: int, mode: FakeTensorMode, target: Target
) -> tuple[Prefix, PreTrainedModel]:
    """Stage 2's prefix and language model, with what learns chosen."""
    section = settings.language_model
    with torch.device("meta"):
        model = language_model.build(section.model_copy(update={"weights": "random"}), paths)
        width = model.get_input_embeddings().weight.shape[1]
        prefix = Prefix(
            settings.encoder.queries, context_width, section.prefix_width, width, positions=section.prefix_positions
        )
        if settings.stage2.learn == "mlp+lora":
            language_model.insert_adapters(model, settings.stage2.lora)
    model.requires_grad_(settings.stage2.learn in ("mlp+llm", "mlp+llm+encoder"))
    if settings.stage2.learn == "mlp+lora":
        language_model.train_adapters(model)
    _store_frozen(model, settings.stage2)
    _attend(model, target)
    for module in (prefix, model):
        stand_in(module, mode)
    return prefix, model


def prompt_length(prompt: str) -> int:
    """Tokens of a prompt, estimated; 0 for none."""
    return len(re.findall(r"\w+|[^\w\s]", prompt)) + 2 if prompt else 0


def _store_frozen(model: nn.Module, training: Training) -> None:
    if training.frozen_precision == "bf16":
        blocks.store_frozen_in_bf16(model)


def _attend(model: PreTrainedModel, target: Target) -> None:
    """The attention that this project runs on the target: fused on a GPU, plain products on a CPU."""
    model.set_attn_implementation("sdpa" if target == "gpu" else "eager")


def recompute_autoencoder(model: Autoencoder, target: Target, precision: Precision) -> None:
    """Switch gradient checkpointing on in all that learns or passes gradients."""
    recompute_encoder(model, target, precision)
    denoiser: Any = model.decoder.denoiser
    denoiser.enable_gradient_checkpointing(partial(checkpoint, **_checkpointing(target, precision)))


def recompute_encoder(model: Autoencoder, target: Target, precision: Precision) -> None:
    """Switch it on where gradients pass between the images and the context."""
    recompute(model.encoder.florence.model.language_model, target, precision)
    for text_encoder in text_encoders(model.decoder.conditioner):
        recompute(text_encoder, target, precision)


def recompute(model: PreTrainedModel, target: Target, precision: Precision) -> None:
    """Switch gradient checkpointing on in a transformers model."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=_checkpointing(target, precision))
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # it recomputes only in training mode


def _checkpointing(target: Target, precision: Precision) -> dict[str, Any]:
    # The backward pass runs outside of Python's function modes, so the second forward enters them again.
    # Without the random state: stand-ins have none.
    return {
        "use_reentrant": False,
        "preserve_rng_state": False,
        "context_fn": lambda: (nullcontext(), on_target(target, precision)),
    }
