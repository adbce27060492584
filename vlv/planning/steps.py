"""One training step of each stage, module by module, on stand-ins.

The order of modules and what passes between them are those of `Autoencoder.forward` and `Captioner.forward`; a
test holds the FLOPs to those of the real ones.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vlv import config
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Prefix
from vlv.planning.counting import Recorder
from vlv.planning.models import stable_diffusion

VAE, TOWER, BART_ENCODER, BART_DECODER, TEXT, UNET = (
    "VAE encode", "vision tower", "BART encoder", "BART decoder", "text encoder", "UNet",
)  # fmt: skip
CONTEXT, PREFIX, LLM, HEAD = "encoder and text side", "prefix MLP", "language model", "word head"


def stage1(model: Autoencoder, settings: config.Stage1, pictures: torch.Tensor, at: Recorder) -> torch.Tensor:
    """Stage 1's loss for pictures (B, 3, S, S) uint8, each denoised `draws_per_image` times."""
    encoder, decoder = model.encoder, stable_diffusion(model)
    florence = encoder.florence.model
    language = florence.language_model

    @torch.no_grad()
    def latents(x: torch.Tensor) -> torch.Tensor:
        mean, spread = decoder.encode(x)
        return torch.cat([mean, spread], 1).float()

    mean, spread = at(VAE, [decoder.vae], latents, pictures).chunk(2, 1)
    features = at(TOWER, [florence.vision_tower, florence.multi_modal_projector], encoder.features, pictures)
    words = [florence.get_input_embeddings()] if len(encoder.prompt_ids) else []
    encoded = at(BART_ENCODER, [language.encoder, *words], lambda x: encoder.encode(x.float()), features)
    reading = [language.decoder.layers, language.decoder.layernorm_embedding, language.decoder.embed_positions]
    embeddings = at(
        BART_DECODER, [*reading, encoder.queries, encoder.projection], lambda x: encoder.decode(x).float(), encoded
    )
    context = at(TEXT, [decoder.conditioner.text_encoder], decoder.condition, embeddings)
    draws = settings.draws_per_image
    mean, spread, context = (x.repeat_interleave(draws, 0) for x in (mean, spread, context))
    noise = torch.empty_like(mean)
    timesteps = torch.empty(len(mean), dtype=torch.long, device=mean.device)
    noisy = decoder.scheduler.add_noise(mean + spread * noise, noise, timesteps)
    prediction = at(UNET, [decoder.unet], lambda c: decoder.denoise(noisy, timesteps, c), context)
    return (prediction.float() - noise).square().mean()


def context_of(model: Autoencoder, pictures: torch.Tensor, at: Recorder) -> torch.Tensor:
    """What Stage 2 reads of the pictures: computed once, as all of it is frozen."""
    text_side = stable_diffusion(model).conditioner

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
