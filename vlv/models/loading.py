"""Loading one pretrained part: only `from_pretrained`, or the same architecture with new weights.

Weights are safetensors; nothing here unpickles or runs code found in a model folder. `weights: random` draws
the same weights every time, so that a control or a test can be repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from vlv import config

logging.disable_progress_bar()  # parts load in a moment here; a bar for each only hides what takes long

_RANDOM_SEED = 20250710


class PretrainedError(RuntimeError):
    """A pretrained part that cannot be built; the message names the folder and what is wrong."""


@contextmanager
def building(what: str, folder: Path, weights: config.Weights) -> Iterator[None]:
    """Around the making of a part: seeded where its weights are random.

    Raises:
        PretrainedError: the part cannot be built; `what` and `folder` say which one.
    """
    with torch.random.fork_rng(devices=[]):
        if weights == "random":
            torch.manual_seed(_RANDOM_SEED)
        try:
            yield
        except PretrainedError:
            raise  # of a part of this part: it names the right folder
        except Exception as error:  # of a damaged folder the libraries raise errors of any kind
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


def schedule(cls: Any, folder: Path) -> Any:
    """The noise schedule of a diffusers folder, of the diffusers class `cls`."""
    with building("scheduler", folder, "pretrained"):
        return cls.from_pretrained(folder, subfolder="scheduler", trust_remote_code=False)


def attention() -> str:
    """The attention implementation that transformers is asked for."""
    # On a CPU the flash kernel's backward for small heads costs more than the plain products.
    return "sdpa" if torch.cuda.is_available() else "eager"


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`."""
    with building("tokenizer", folder, "pretrained"):
        # tokenizer.json says all; AutoTokenizer would go by the model type beside it and, for a Qwen2 with
        # words of its own, quietly build another tokenizer from the same file.
        whole = (folder / "tokenizer.json").exists()
        kind = PreTrainedTokenizerFast if whole else AutoTokenizer
        loaded: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
        return loaded


def words(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`; None for an architecture alone, which may come without one."""
    return tokenizer(folder) if folder.exists() else None


def text_encoder(cls: Any, settings_cls: Any, folder: Path, name: str, weights: config.Weights) -> Any:
    """The text encoder `name` of a diffusers folder, of the transformers class `cls`, in float32."""
    with building(name, folder, weights):
        if weights == "random":
            settings = settings_cls.from_pretrained(folder / name, trust_remote_code=False)
            settings._attn_implementation = attention()
            # A configuration also carries the dtype its weights were shipped in: without `float` new weights would
            # be made in half precision.
            return cls(settings).float().eval()
        return cls.from_pretrained(
            folder / name,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=attention(),
            trust_remote_code=False,
        ).eval()
