"""Building the pretrained parts: only `from_pretrained`, or the same architecture with new weights.

Weights are safetensors; nothing here unpickles or runs code found in a model folder. `weights: random` draws
the same weights every time, so that a control or a test can be repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from vlv import assets, config
from vlv.config import Paths
from vlv.models import encoder as encoders
from vlv.models.conditioner import TextConditioner
from vlv.models.decoder import StableDiffusionDecoder
from vlv.models.encoder import CaptionEncoder, Projection

logging.disable_progress_bar()  # parts load in a moment here; a bar for each only hides what takes long

_RANDOM_SEED = 20250710
# What the text side expects at its input ("embedding") and gives at its output ("context"): mean and spread of
# each position, each (T, W). Shipped with a teacher, made from text alone.
STATISTICS = "text_statistics.safetensors"


class PretrainedError(RuntimeError):
    """A pretrained part that cannot be built; the message names the folder and what is wrong."""


@contextmanager
def _building(what: str, folder: Path, weights: config.Weights) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        if weights == "random":
            torch.manual_seed(_RANDOM_SEED)
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first = str(error).strip().split("\n")[0]
            raise PretrainedError(f"{what} could not be built from {folder}: {first}") from error


def folder_of(section: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> Path:
    """Where the part lies; with random weights the folder that describes its architecture is enough."""
    if section.weights == "random" and section.architecture:
        return assets.resolve(section.architecture, paths)
    return assets.resolve(section.pretrained, paths)


def _diffusers(cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    with _building(name, folder, weights):
        if weights == "random":
            return cls.from_config(cls.load_config(folder, subfolder=name)).eval()
        return cls.from_pretrained(
            folder, subfolder=name, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        ).eval()


# `.float()` below: a configuration also carries the dtype its weights were shipped in, and new weights would be
# made in half precision.


def _attention() -> str:
    # On a CPU the flash kernel's backward for small heads costs more than the plain products.
    return "sdpa" if torch.cuda.is_available() else "eager"


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`."""
    with _building("tokenizer", folder, "pretrained"):
        # tokenizer.json says all; AutoTokenizer would go by the model type beside it and, for a Qwen2 with
        # words of its own, quietly build another tokenizer from the same file.
        whole = (folder / "tokenizer.json").exists()
        loaded: PreTrainedTokenizerBase = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)
        return loaded


def conditioner(section: config.Decoder, paths: Paths) -> TextConditioner:
    """The frozen text side of the decoder."""
    folder = folder_of(section, paths)
    with _building("text_encoder", folder, section.weights):
        if section.weights == "random":
            settings = CLIPTextConfig.from_pretrained(folder / "text_encoder")
            settings._attn_implementation = _attention()
            text_encoder = CLIPTextModel(settings).float()
        else:
            text_encoder = CLIPTextModel.from_pretrained(
                folder / "text_encoder",
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=_attention(),
            )
    # An architecture alone (weights: random) may come without words; then only embeddings can be conditioned on.
    words = tokenizer(folder / "tokenizer") if (folder / "tokenizer").exists() else None
    return TextConditioner(text_encoder.eval(), words, use_text_encoder=section.use_text_encoder)


def decoder(section: config.Decoder, paths: Paths) -> StableDiffusionDecoder:
    """The whole frozen text-to-image model."""
    folder = folder_of(section, paths)
    with _building("scheduler", folder, "pretrained"):
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    built = StableDiffusionDecoder(
        _diffusers(AutoencoderKL, folder, "vae", section.weights),
        _diffusers(UNet2DConditionModel, folder, "unet", section.weights),
        conditioner(section, paths),
        scheduler,
        image_size=section.image_size,
    )
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
    section: config.Encoder, width: int, paths: Paths, statistics: tuple[torch.Tensor, torch.Tensor] | None
) -> CaptionEncoder:
    """Florence-2 with new queries and a new projection to `width`; draws from torch's global generator."""
    folder = folder_of(section, paths)
    with _building("encoder", folder, section.weights):
        if section.weights == "random":
            settings = Florence2Config.from_pretrained(folder)
            settings._attn_implementation = _attention()
            florence = Florence2ForConditionalGeneration(settings).float()
        else:
            florence = Florence2ForConditionalGeneration.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, attn_implementation=_attention()
            )
    words = tokenizer(folder) if section.prompt else None
    mean, std = encoders.processor_statistics(folder)
    projection = Projection(
        florence.config.text_config.d_model, section.projection_width, width, statistics, section.start_gain
    )
    return CaptionEncoder(
        florence.eval(), encoders.tokenize_prompt(words, section.prompt), section.image_size, mean, std,
        queries=section.queries, projection=projection,
    )  # fmt: skip


def language_model(section: config.LanguageModel, paths: Paths) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer."""
    return language_model_alone(section, paths), tokenizer(folder_of(section, paths))


def language_model_alone(section: config.LanguageModel, paths: Paths) -> PreTrainedModel:
    """The causal language model, of any Auto class."""
    folder = folder_of(section, paths)
    with _building("language model", folder, section.weights):
        if section.weights == "random":
            settings = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(settings, attn_implementation=_attention()).float()
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, attn_implementation=_attention()
            )
    built: PreTrainedModel = model.eval()
    return built
