"""Builds the pretrained parts, with their weights or with new ones.

Weights are safetensors. Nothing here unpickles data or runs code from a model folder. `weights: random` gives the
same weights every time, so that a control or a test can be repeated.

Code for one kind of decoder is in that kind's module, and only the module of the configured kind is imported.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import safetensors.torch
import torch
from pydantic import ValidationError
from transformers import (
    AutoTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from vlv import config
from vlv.config import ConfigError, Paths, Section
from vlv.io import assets
from vlv.io.images import Preprocessing
from vlv.models.decoders.base import Conditioner, Decoder
from vlv.models.encoder import CaptionEncoder, Projection, processor_statistics, tokenize_prompt

logging.disable_progress_bar()  # parts load quickly; a bar for each would hide the slow steps

# Mean and std of each position, each (T, W), of the text side's input ("embedding") and output ("context"). The file
# is shipped with a text-to-image model and computed from text alone.
STATISTICS = "text_statistics.safetensors"
_RANDOM_SEED = 20250710


class PretrainedError(RuntimeError):
    """A pretrained part cannot be built; the message names the folder and the problem."""


def folder_of(section: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> Path:
    """The part's folder. With random weights it is the folder of the architecture, if the section names one."""
    if section.weights == "random" and section.architecture:
        return assets.resolve(section.architecture, paths)
    return assets.resolve(section.pretrained, paths)


@contextmanager
def building(what: str, folder: Path, weights: config.Weights) -> Iterator[None]:
    """Wrap the building of a part: seed torch if its weights are random, and name the part in errors.

    Raises:
        PretrainedError: the part cannot be built; `what` and `folder` say which one.
    """
    with torch.random.fork_rng(devices=[]):
        if weights == "random":
            torch.manual_seed(_RANDOM_SEED)
        try:
            yield
        except (PretrainedError, ConfigError):
            raise  # it already names the inner part or the setting
        except Exception as error:  # the libraries raise errors of any kind for a damaged folder
            first = (str(error).strip() or type(error).__name__).split("\n")[0]
            if "trust_remote_code" in str(error):
                first = (
                    "its config.json names code of its own (auto_map), which is never run here. Choose a model that "
                    "transformers has a class for."
                )
            raise PretrainedError(f"{what} could not be built from {folder}: {first}") from error


def diffusers_part(cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    """The part `name` of a diffusers folder, of the diffusers class `cls`, in float32."""
    with building(name, folder, weights):
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


def noise_schedule(cls: Any, folder: Path) -> Any:
    """The noise schedule of a diffusers folder, of the diffusers class `cls`."""
    with building("scheduler", folder, "pretrained"):
        return cls.from_pretrained(folder, subfolder="scheduler", trust_remote_code=False)


def attention() -> str:
    """The attention implementation for transformers."""
    # On a CPU the backward pass of the flash kernel costs more than plain products if heads are small.
    return "sdpa" if torch.cuda.is_available() else "eager"


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`."""
    with building("tokenizer", folder, "pretrained"):
        # tokenizer.json describes the whole tokenizer. AutoTokenizer uses the model type in config.json instead: for
        # a Qwen2 with another vocabulary it builds a wrong tokenizer from the same file, without a warning.
        whole = (folder / "tokenizer.json").exists()
        kind = PreTrainedTokenizerFast if whole else AutoTokenizer
        loaded: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
        return loaded


def tokenizer_if_any(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`; None if there is none, as is possible for an architecture alone."""
    return tokenizer(folder) if folder.exists() else None


def text_encoder(cls: Any, settings_cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    """The text encoder `name` of a diffusers folder, of the transformers class `cls`, in float32."""
    with building(name, folder, weights):
        if weights == "random":
            settings = settings_cls.from_pretrained(folder / name, trust_remote_code=False)
            settings._attn_implementation = attention()
            # The configuration names the dtype of the shipped weights. Without `float` new weights would also be half
            # precision.
            return cls(settings).float().eval()
        return cls.from_pretrained(
            folder / name,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=attention(),
            trust_remote_code=False,
        ).eval()


# -- decoders --------------------------------------------------------------------------------------------


class Kind(Protocol):
    """The interface of a decoder kind's module: two functions that build its parts from a folder.

    `folder` is the local folder of `decoder.pretrained`. With `weights: random` it may hold only configurations, and
    `vlv plan` calls both functions on the meta device.
    """

    def build_conditioner(self, section: config.Decoder, folder: Path) -> Conditioner[Any]:
        """The text side, the only part of a decoder that Stage 2 needs."""
        ...

    def build(self, section: config.Decoder, folder: Path, conditioner: Conditioner[Any]) -> Decoder[Any]:
        """The decoder around the conditioner that `build_conditioner` made."""
        ...


def kind(section: config.Decoder) -> Kind:
    """The module of the configured kind.

    Raises:
        ConfigError: it cannot be imported, or it lacks a function of `Kind`.
    """
    try:
        module = importlib.import_module(section.module)
    except ImportError as error:
        raise ConfigError(
            f"decoder.kind: {section.module} cannot be imported ({error}). Install it, or start Python in the folder "
            "that holds it."
        ) from error
    if missing := [name for name in ("build_conditioner", "build") if not callable(getattr(module, name, None))]:
        raise ConfigError(
            f"decoder.kind: {section.module} is no kind of decoder: it does not define {' and '.join(missing)}. "
            "See docs/decoders.md."
        )
    return cast(Kind, module)


Options = TypeVar("Options", bound=Section)


def options(section: config.Decoder, known: type[Options]) -> Options:
    """The settings that only this kind has, checked; `known` is their class (`Section` if there are none).

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    try:
        return known.model_validate(section.options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"decoder.options.{'.'.join(map(str, first['loc']))}: {first['msg']}. The options of kind {section.kind}: "
            f"{', '.join(known.model_fields) or 'none'}"
        ) from error


def conditioner(section: config.Decoder, paths: Paths) -> Conditioner[Any]:
    """The frozen text side of the decoder."""
    return kind(section).build_conditioner(section, folder_of(section, paths))


def decoder(section: config.Decoder, paths: Paths) -> Decoder[Any]:
    """The whole frozen text-to-image model."""
    folder = folder_of(section, paths)
    text_side = conditioner(section, paths)
    with building("decoder", folder, "pretrained"):
        built = kind(section).build(section, folder, text_side)
    return built.requires_grad_(False)


def text_statistics(section: config.Decoder, paths: Paths, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std, each (Q, W), that the projection starts from.

    They are those of the first Q positions of the input of `condition`, or of the context if caption embeddings do not
    pass through the text encoder.

    Raises:
        PretrainedError: the decoder's folder has no such statistics, or too few positions.
    """
    path = folder_of(section, paths) / STATISTICS
    if not path.exists():
        raise PretrainedError(f"{path} is missing; set encoder.start_on_text_side to false")
    tensors = safetensors.torch.load_file(path)
    side = "embedding" if section.use_text_encoder else "context"
    mean, std = tensors[f"{side}_mean"].float(), tensors[f"{side}_std"].float()
    if len(mean) < queries:
        raise PretrainedError(f"{path} has {len(mean)} positions, but encoder.queries is {queries}")
    return mean[:queries], std[:queries]


def encoder(
    section: config.Encoder,
    preprocessing: Preprocessing,
    width: int,
    paths: Paths,
    statistics: tuple[torch.Tensor, torch.Tensor] | None,
) -> CaptionEncoder:
    """Florence-2 with new queries and a new projection to `width`; uses torch's global RNG."""
    folder = folder_of(section, paths)
    kernel = "eager" if section.dropout else attention()  # a fused kernel generates its own dropout masks
    with building("encoder", folder, section.weights):
        if section.weights == "random":
            settings = Florence2Config.from_pretrained(folder, trust_remote_code=False)
            settings._attn_implementation = kernel
            florence = Florence2ForConditionalGeneration(settings).float()
        else:
            florence = Florence2ForConditionalGeneration.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=kernel,
                trust_remote_code=False,
            )
    words = tokenizer(folder) if section.prompt else None
    mean, std = processor_statistics(folder)
    projection = Projection(
        florence.config.text_config.d_model, section.projection_width, width, statistics, section.start_gain
    )
    return CaptionEncoder(
        florence.eval(), tokenize_prompt(words, section.prompt), preprocessing, mean, std,
        queries=section.queries, projection=projection, query_std=section.query_std, drop_rate=section.dropout,
        drop_path=section.drop_path,
    )  # fmt: skip
