"""Building the pretrained parts that the configuration names.

What is particular to a kind of decoder stands in that kind's modules, `vlv.models.decoders.KIND` and
`vlv.models.conditioners.KIND`; only the configured kind is imported.
"""

import importlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlv import config
from vlv.config import Paths
from vlv.io import assets
from vlv.io.preprocessing import Preprocessing
from vlv.models import encoder as encoders
from vlv.models import loading
from vlv.models.conditioners.base import Conditioner
from vlv.models.decoders.base import Decoder
from vlv.models.encoder import CaptionEncoder, Projection
from vlv.models.loading import PretrainedError

# What the text side expects at its input ("embedding") and gives at its output ("context"): mean and spread of
# each position, each (T, W). Shipped with a teacher, made from text alone.
STATISTICS = "text_statistics.safetensors"


def folder_of(section: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> Path:
    """Where the part lies; with random weights the folder that describes its architecture is enough."""
    if section.weights == "random" and section.architecture:
        return assets.resolve(section.architecture, paths)
    return assets.resolve(section.pretrained, paths)


def conditioner(section: config.Decoder, paths: Paths) -> Conditioner[Any]:
    """The frozen text side of the decoder."""
    kind = importlib.import_module(f"vlv.models.conditioners.{section.kind}")
    built: Conditioner[Any] = kind.build(section, folder_of(section, paths))
    return built


def decoder(section: config.Decoder, paths: Paths) -> Decoder[Any]:
    """The whole frozen text-to-image model."""
    folder = folder_of(section, paths)
    kind = importlib.import_module(f"vlv.models.decoders.{section.kind}")
    text_side = conditioner(section, paths)
    with loading.building("decoder", folder, "pretrained"):
        built: Decoder[Any] = kind.build(section, folder, text_side)
    return built.requires_grad_(False)


def text_statistics(section: config.Decoder, paths: Paths, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread (Q, W) that the projection starts from: of what `condition` takes, at the first Q positions."""
    path = folder_of(section, paths) / STATISTICS
    if not path.exists():
        raise PretrainedError(f"{path} is missing; set encoder.start_on_text_side to false")
    tensors = safetensors.torch.load_file(path)
    side = "embedding" if section.use_text_encoder else "context"
    mean, spread = tensors[f"{side}_mean"].float(), tensors[f"{side}_spread"].float()
    if len(mean) < queries:
        raise PretrainedError(f"{path} has {len(mean)} positions, but encoder.queries is {queries}")
    return mean[:queries], spread[:queries]


def encoder(
    section: config.Encoder,
    preprocessing: Preprocessing,
    width: int,
    paths: Paths,
    statistics: tuple[torch.Tensor, torch.Tensor] | None,
) -> CaptionEncoder:
    """Florence-2 with new queries and a new projection to `width`; draws from torch's global generator."""
    folder = folder_of(section, paths)
    attention = "eager" if section.dropout else loading.attention()  # a fused kernel draws its own masks
    with loading.building("encoder", folder, section.weights):
        if section.weights == "random":
            settings = Florence2Config.from_pretrained(folder, trust_remote_code=False)
            settings._attn_implementation = attention
            florence = Florence2ForConditionalGeneration(settings).float()
        else:
            florence = Florence2ForConditionalGeneration.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=False,
            )
    words = loading.tokenizer(folder) if section.prompt else None
    mean, std = encoders.processor_statistics(folder)
    projection = Projection(
        florence.config.text_config.d_model, section.projection_width, width, statistics, section.start_gain
    )
    return CaptionEncoder(
        florence.eval(), encoders.tokenize_prompt(words, section.prompt), preprocessing, mean, std,
        queries=section.queries, projection=projection, query_std=section.query_std, drop_rate=section.dropout,
        drop_path=section.drop_path,
    )  # fmt: skip


def language_model(
    section: config.LanguageModel, paths: Paths
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal language model and its tokenizer; an architecture alone (weights: random) may come without words."""
    wordless = section.weights == "random" and section.architecture is not None
    words = None if wordless else loading.tokenizer(folder_of(section, paths))
    return language_model_alone(section, paths), words


def language_model_alone(section: config.LanguageModel, paths: Paths) -> PreTrainedModel:
    """The causal language model, of any Auto class."""
    folder = folder_of(section, paths)
    with loading.building("language model", folder, section.weights):
        if section.weights == "random":
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(
                settings, attn_implementation=loading.attention(), trust_remote_code=False
            ).float()
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=loading.attention(),
                trust_remote_code=False,
            )
    built: PreTrainedModel = model.eval()
    return built
