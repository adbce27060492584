"""The caches that both stages train from. A part's weights, its settings and its code identify each cache."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from vlv import config
from vlv.config import Config, Paths, Precision
from vlv.data.cache import Compute, ShardCache
from vlv.inputs import closure
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.models.encoder import CaptionEncoder
from vlv.stages import inputs
from vlv.training import blocks

# The code that reads the shards and stores the results, whatever is computed.
_KEPT_BY = ("vlv.data.cache:ShardCache.fill",)
# The code that computes the parts.
_LIBRARIES = ("torch", "transformers", "diffusers")


def latents(settings: Config, paths: Paths, model: Autoencoder) -> ShardCache:
    """Mean and std of the VAE's latents, each (B, c, h, w)."""

    def compute(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, std = model.decoder.encode(batch)
        return {"latent_mean": mean, "latent_std": std}

    roots = [
        *inputs.decoder_code(settings.decoder),
        "vlv.models.build:decoder",
        "vlv.models.decoders.base:Decoder.encode",
    ]
    precision = settings.stage1.precision
    decided_by = _of_part(settings.decoder, paths, precision) | _code(roots)
    return _cache("latents", decided_by, paths, _in_precision(compute, model.device, precision))


def features(settings: Config, paths: Paths, encoder: CaptionEncoder, precision: Precision) -> ShardCache:
    """The frozen vision tower's features (B, T, D)."""
    roots = ["vlv.models.build:encoder", "vlv.models.encoder:CaptionEncoder.features"]
    decided_by = _of_part(settings.encoder, paths, precision) | _code(roots)
    compute = _in_precision(lambda x: {"features": encoder.features(x)}, encoder.queries.device, precision)
    return _cache("features", decided_by, paths, compute)


def contexts(settings: Config, paths: Paths, captioner: Captioner) -> ShardCache:
    """The context (B, Q, C) of the encoder as Stage 1 left it."""
    roots = [
        *inputs.decoder_code(settings.decoder),
        "vlv.models.build:conditioner",
        "vlv.models.build:encoder",
        "vlv.models.captioner:Captioner.context",
    ]
    precision = settings.stage2.precision
    decided_by = {
        "encoder": inputs.tensor_hash(captioner.encoder),
        "path": "through" if settings.decoder.use_text_encoder else "direct",
        **_of_part(settings.decoder, paths, precision),
        **_code(roots),
    }
    compute = _in_precision(lambda x: {"context": captioner.context(x)}, captioner.encoder.queries.device, precision)
    return _cache("context", decided_by, paths, compute)


def _of_part(part: config.Encoder | config.Decoder, paths: Paths, precision: Precision) -> dict[str, str]:
    return {"part": inputs.part_hash(part, paths), "size": str(part.image_size), "precision": precision}


def _code(roots: list[str]) -> dict[str, str]:
    return {"code": closure.code_hash(*roots, *_KEPT_BY), **{name: version(name) for name in _LIBRARIES}}


def _in_precision(compute: Compute, device: torch.device, precision: Precision) -> Compute:
    def computed(batch: torch.Tensor) -> Any:
        with blocks.autocast(device, precision):
            return compute(batch)

    return computed


def _cache(kind: str, decided_by: dict[str, str], paths: Paths, compute: Callable[[torch.Tensor], Any]) -> ShardCache:
    return ShardCache(paths.cache, kind, decided_by, paths.data, "train", compute)
