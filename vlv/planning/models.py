"""The configured models at full size, without their numbers."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv.config import Config, ConfigError, Paths, Precision
from vlv.models import pretrained
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Prefix
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder
from vlv.planning.stand_ins import Target, like, on_target, stand_in


def autoencoder(settings: Config, paths: Paths, mode: FakeTensorMode, target: Target) -> Autoencoder:
    """Stage 1's model. Weights are not read: the architectures' configurations are enough.

    The prompt's length is estimated (words and punctuation marks, begin and end), as the tokenizer may not be at hand.

    Raises:
        ConfigError: a kind of decoder whose steps are not counted yet.
    """
    random = {"weights": "random"}
    encoder = settings.encoder.model_copy(update={**random, "prompt": ""})
    decoder = settings.decoder.model_copy(update=random)
    with torch.device("meta"):
        model = Autoencoder.build(settings.model_copy(update={"encoder": encoder, "decoder": decoder}), paths)
        prompt = torch.zeros(prompt_length(settings.encoder.prompt), dtype=torch.long)
    drawing = stable_diffusion(model)
    model.encoder.prompt_ids = prompt
    model.encoder.set_learning(settings.stage1.learn)
    _attend(model.encoder.florence, target)
    _attend(drawing.conditioner.text_encoder, target)
    drawing.unet.set_attn_processor(AttnProcessor2_0() if target == "gpu" else AttnProcessor())
    stand_in(model, mode)
    model.decoder.scheduler.alphas_cumprod = like(model.decoder.scheduler.alphas_cumprod, mode)
    return model


def stable_diffusion(model: Autoencoder) -> StableDiffusionDecoder:
    """The model's decoder.

    Raises:
        ConfigError: of a kind whose steps are not counted yet.
    """
    if not isinstance(model.decoder, StableDiffusionDecoder):
        raise ConfigError(
            f"vlv plan counts decoder.kind stable_diffusion only so far, not {type(model.decoder).__name__}"
        )
    return model.decoder


def language_side(
    settings: Config, paths: Paths, context_width: int, mode: FakeTensorMode, target: Target
) -> tuple[Prefix, PreTrainedModel]:
    """Stage 2's prefix and language model, with what learns chosen.

    Raises:
        ConfigError: a choice of what learns that is not counted yet.
    """
    if settings.stage2.learn not in ("mlp", "mlp+llm"):
        raise ConfigError(f"vlv plan counts stage2.learn mlp and mlp+llm only so far, not {settings.stage2.learn}")
    section = settings.language_model
    with torch.device("meta"):
        model = pretrained.language_model_alone(section.model_copy(update={"weights": "random"}), paths)
        width = model.get_input_embeddings().weight.shape[1]
        prefix = Prefix(
            settings.encoder.queries, context_width, section.prefix_width, width, positions=section.prefix_positions
        )
    model.requires_grad_(settings.stage2.learn != "mlp")
    _attend(model, target)
    for module in (prefix, model):
        stand_in(module, mode)
    return prefix, model


def prompt_length(prompt: str) -> int:
    """Tokens of a prompt, estimated; 0 for none."""
    return len(re.findall(r"\w+|[^\w\s]", prompt)) + 2 if prompt else 0


def _attend(model: PreTrainedModel, target: Target) -> None:
    """The attention that this project runs on the target: fused on a GPU, plain products on a CPU."""
    model.set_attn_implementation("sdpa" if target == "gpu" else "eager")


def recompute_autoencoder(model: Autoencoder, target: Target, precision: Precision) -> None:
    """Switch gradient checkpointing on in all that learns or passes gradients."""
    recompute(model.encoder.florence.model.language_model, target, precision)
    decoder = stable_diffusion(model)
    recompute(decoder.conditioner.text_encoder, target, precision)
    decoder.unet.enable_gradient_checkpointing(partial(checkpoint, **_checkpointing(target, precision)))


def recompute(model: PreTrainedModel, target: Target, precision: Precision) -> None:
    """Switch gradient checkpointing on in a transformers model."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_checkpointing(target, precision))
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
