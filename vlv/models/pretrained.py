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
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging

from vlv import assets, config
from vlv.config import Paths
from vlv.models import encoder as encoders
from vlv.models.conditioners.base import Conditioner
from vlv.models.conditioners.clip import ClipReader
from vlv.models.conditioners.sd3 import SD3Conditioner, T5Reader
from vlv.models.conditioners.sdxl import SDXLConditioner
from vlv.models.conditioners.stable_diffusion import TextConditioner
from vlv.models.decoders.base import Decoder
from vlv.models.decoders.sd3 import SD3Decoder
from vlv.models.decoders.sdxl import SDXLDecoder
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder
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
        except Exception as error:  # of a damaged folder the libraries raise errors of any kind
            first = (str(error).strip() or type(error).__name__).split("\n")[0]
            if "trust_remote_code" in str(error):
                first = (
                    "its config.json names code of its own (auto_map), which is never run here. Choose a model that "
                    "transformers has a class for."
                )
            raise PretrainedError(f"{what} could not be built from {folder}: {first}") from error


def folder_of(section: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> Path:
    """Where the part lies; with random weights the folder that describes its architecture is enough."""
    if section.weights == "random" and section.architecture:
        return assets.resolve(section.architecture, paths)
    return assets.resolve(section.pretrained, paths)


def _diffusers(cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    with _building(name, folder, weights):
        if weights == "random":
            return cls.from_config(cls.load_config(folder, subfolder=name), trust_remote_code=False).eval()
        return cls.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            trust_remote_code=False,
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
        kind = PreTrainedTokenizerFast if whole else AutoTokenizer
        loaded: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
        return loaded


def _text_encoder(cls: Any, settings_cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    with _building(name, folder, weights):
        if weights == "random":
            settings = settings_cls.from_pretrained(folder / name, trust_remote_code=False)
            settings._attn_implementation = _attention()
            return cls(settings).float().eval()
        return cls.from_pretrained(
            folder / name,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=_attention(),
            trust_remote_code=False,
        ).eval()


def conditioner(section: config.Decoder, paths: Paths) -> Conditioner[Any]:
    """The frozen text side of the decoder."""
    folder = folder_of(section, paths)
    through = section.use_text_encoder

    def words(name: str) -> PreTrainedTokenizerBase | None:
        # An architecture alone (weights: random) may come without words; then only embeddings can be conditioned on.
        return tokenizer(folder / name) if (folder / name).exists() else None

    def reader(cls: Any, number: str) -> ClipReader:
        model = _text_encoder(cls, CLIPTextConfig, folder, f"text_encoder{number}", section.weights)
        return ClipReader(model, words(f"tokenizer{number}"))

    match section.kind:
        case "stable_diffusion":
            text_encoder = _text_encoder(CLIPTextModel, CLIPTextConfig, folder, "text_encoder", section.weights)
            return TextConditioner(text_encoder, words("tokenizer"), use_text_encoder=through)
        case "sdxl":
            first, second = reader(CLIPTextModel, ""), reader(CLIPTextModelWithProjection, "_2")
            return SDXLConditioner(first, second, use_text_encoder=through)
        case "sd3":
            first, second = reader(CLIPTextModelWithProjection, ""), reader(CLIPTextModelWithProjection, "_2")
            t5 = None
            if section.use_t5:
                model = _text_encoder(T5EncoderModel, T5Config, folder, "text_encoder_3", section.weights)
                t5 = T5Reader(model, words("tokenizer_3"))
            return SD3Conditioner(first, second, t5, use_text_encoder=through)


# kind -> its class, its denoiser's class and folder, its schedule's class
_KINDS: dict[str, tuple[Any, Any, str, Any]] = {
    "stable_diffusion": (StableDiffusionDecoder, UNet2DConditionModel, "unet", DDPMScheduler),
    "sdxl": (SDXLDecoder, UNet2DConditionModel, "unet", DDPMScheduler),
    "sd3": (SD3Decoder, SD3Transformer2DModel, "transformer", FlowMatchEulerDiscreteScheduler),
}


def decoder(section: config.Decoder, paths: Paths) -> Decoder[Any]:
    """The whole frozen text-to-image model."""
    folder = folder_of(section, paths)
    kind, denoiser_class, denoiser, schedule = _KINDS[section.kind]
    with _building("scheduler", folder, "pretrained"):
        scheduler = schedule.from_pretrained(folder, subfolder="scheduler", trust_remote_code=False)
    vae = _diffusers(AutoencoderKL, folder, "vae", section.weights)
    network = _diffusers(denoiser_class, folder, denoiser, section.weights)
    text_side = conditioner(section, paths)
    with _building("decoder", folder, "pretrained"):
        built: Decoder[Any] = kind(vae, network, text_side, scheduler, image_size=section.image_size)
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
            settings = Florence2Config.from_pretrained(folder, trust_remote_code=False)
            settings._attn_implementation = _attention()
            florence = Florence2ForConditionalGeneration(settings).float()
        else:
            florence = Florence2ForConditionalGeneration.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=_attention(),
                trust_remote_code=False,
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


def language_model(
    section: config.LanguageModel, paths: Paths
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal language model and its tokenizer; an architecture alone (weights: random) may come without words."""
    wordless = section.weights == "random" and section.architecture is not None
    words = None if wordless else tokenizer(folder_of(section, paths))
    return language_model_alone(section, paths), words


def language_model_alone(section: config.LanguageModel, paths: Paths) -> PreTrainedModel:
    """The causal language model, of any Auto class."""
    folder = folder_of(section, paths)
    with _building("language model", folder, section.weights):
        if section.weights == "random":
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(
                settings, attn_implementation=_attention(), trust_remote_code=False
            ).float()
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=_attention(),
                trust_remote_code=False,
            )
    built: PreTrainedModel = model.eval()
    return built
