"""One training step of each stage, module by module, on stand-ins.

The order of modules and what passes between them are those of `Autoencoder.forward` and `Captioner.forward`; a
test holds the FLOPs to those of the real ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vlv import config
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Prefix
from vlv.models.decoders.base import Conditioner, Context
from vlv.models.decoders.sd3 import SD3Conditioner, SD3Decoder
from vlv.models.decoders.stable_diffusion import TextConditioner
from vlv.plan.counting import Recorder

VAE, TOWER, BART_ENCODER, BART_DECODER, TEXT, UNET, TRANSFORMER = (
    "VAE encode", "vision tower", "BART encoder", "BART decoder", "text encoder", "UNet", "transformer",
)  # fmt: skip
CONTEXT, PREFIX, LLM, HEAD = "encoder and text side", "prefix MLP", "language model", "word head"


def stage1(model: Autoencoder, settings: config.Stage1, pictures: torch.Tensor, at: Recorder) -> torch.Tensor:
    """Stage 1's loss for pictures (B, 3, S, S) uint8, each denoised `draws_per_image` times."""
    decoder, draws = model.decoder, settings.draws_per_image

    @torch.no_grad()
    def latents(x: torch.Tensor) -> torch.Tensor:
        mean, std = decoder.encode(x)
        return torch.cat([mean, std], 1).float()

    mean, std = at(VAE, [decoder.vae], latents, pictures).chunk(2, 1)
    embeddings = _embeddings(model, pictures, at)
    context = at(TEXT, [decoder.conditioner], lambda e: _packed(decoder.condition(e)), embeddings)
    mean, std, context = (x.repeat_interleave(draws, 0) for x in (mean, std, context))
    noise = torch.empty_like(mean)
    drawn = torch.empty(len(mean), dtype=torch.long, device=mean.device)
    noisy, target, timesteps = decoder.add_noise(mean + std * noise, noise, drawn)
    network = decoder.denoiser
    prediction = at(
        TRANSFORMER if isinstance(decoder, SD3Decoder) else UNET,
        [network],
        lambda c: decoder.denoise(noisy, timesteps, _unpacked(c, decoder.conditioner, embeddings.shape[1])),
        context,
    )
    return (prediction.float() - target).square().mean()


def _embeddings(model: Autoencoder, pictures: torch.Tensor, at: Recorder) -> torch.Tensor:
    """Caption embeddings (B, Q, W), module by module."""
    encoder = model.encoder
    florence = encoder.florence.model
    language = florence.language_model
    features = at(TOWER, [florence.vision_tower, florence.multi_modal_projector], encoder.features, pictures)
    words = [florence.get_input_embeddings()] if len(encoder.prompt_ids) else []
    encoded = at(BART_ENCODER, [language.encoder, *words], lambda x: encoder.encode(x.float()), features)
    reading = [language.decoder.layers, language.decoder.layernorm_embedding, language.decoder.embed_positions]
    return at(
        BART_DECODER, [*reading, encoder.queries, encoder.projection], lambda x: encoder.decode(x).float(), encoded
    )


def _packed(context: torch.Tensor | Context) -> torch.Tensor:
    """A context of several tensors as one, (B, N): a recorder hands on one tensor."""
    if isinstance(context, torch.Tensor):
        return context
    parts = [context.states, context.pooled, *([] if context.t5 is None else [context.t5])]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _unpacked(packed: torch.Tensor, conditioner: Conditioner[Any], queries: int) -> Any:
    """Inverse of `_packed`."""
    if isinstance(conditioner, TextConditioner):
        return packed
    t5_width = conditioner.t5_width if isinstance(conditioner, SD3Conditioner) else 0
    width = conditioner.width - t5_width
    lengths = [queries * width, packed.shape[1] - queries * conditioner.width, queries * t5_width]
    states, pooled, t5 = packed.split(lengths, 1)
    return Context(
        states.unflatten(1, (queries, width)), pooled, t5.unflatten(1, (queries, t5_width)) if t5_width else None
    )


def context_of(model: Autoencoder, pictures: torch.Tensor, at: Recorder, *, learns: bool) -> torch.Tensor:
    """What Stage 2 reads of the pictures, (B, Q, C): computed once where all of it is frozen."""
    text_side = model.decoder.conditioner
    if learns:
        return at(TEXT, [text_side], text_side.states, _embeddings(model, pictures, at))

    @torch.no_grad()
    def context(x: torch.Tensor) -> torch.Tensor:
        return text_side.states(model.encoder(model.encoder.features(x)).float())

    return at(CONTEXT, [model.encoder, text_side], context, pictures)


def stage2(
    prefix: Prefix, model: PreTrainedModel, context: torch.Tensor, ids: torch.Tensor, at: Recorder
) -> torch.Tensor:
    """Stage 2's loss for context (B, Q, C) and caption token ids (B, T), none of them padding."""
    words = model.get_input_embeddings()
    leading = at(PREFIX, [prefix], lambda c: prefix(c.float()), context)
    first = leading.shape[1]

    def read(x: torch.Tensor) -> torch.Tensor:
        embedded = words(ids)
        inputs = torch.cat([x.to(embedded.dtype), embedded], 1)
        states: torch.Tensor = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states[:, first - 1 : -1].flatten(0, 1)

    def loss(states: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(states)
        return F.cross_entropy(logits.float(), ids.flatten())

    states = at(LLM, [model.base_model], read, leading)
    return at(HEAD, [model.get_output_embeddings()], loss, states)
