"""A GGUF file -> the same causal language model in Hugging Face form, once.

Quantised models are often published as GGUF. Reading one takes a minute and gives tensors of full precision, so this
is done once, and the result is stored as safetensors.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vlv.convert.checkpoints import ConversionError
from vlv.io import files

_NAME = "model.gguf"


def convert(source: Path, target: Path) -> None:
    """Write `target` (config.json, bfloat16 safetensors, tokenizer) from the GGUF file `source`; atomic.

    Nothing else in the folder of `source` is read.

    Raises:
        ConversionError: `target` exists already; the package gguf is not installed; the sizes in the file's header are
            missing or are not those of its tensors; or transformers knows no such language model.
    """
    if target.exists():
        raise ConversionError(f"{target} exists already; give another place, or remove it.")
    if not source.is_file():
        raise ConversionError(f"{source} is not a file; give a .gguf file.")
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF through it
        raise ConversionError("Reading GGUF needs the package gguf: pip install gguf")
    from vlv.convert import gguf_header

    header = gguf_header.read(source)
    # transformers reads a folder. The file gets one of its own, so that configurations and code beside it are not read.
    with tempfile.TemporaryDirectory(prefix="vlv-gguf-") as folder:
        (Path(folder) / _NAME).symlink_to(source.resolve())
        try:
            _check_size(Path(folder), header.elements)
            quantised, tokenizer = _load(Path(folder))
        except ConversionError as error:
            raise ConversionError(f"{source}: {error}") from error
        except Exception as error:  # of a damaged file the libraries raise errors of any kind
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ConversionError(f"{source} cannot be read as a causal language model: {reason}") from error
    # The loaded model is marked as quantised and cannot be saved. So its weights go into a model whose configuration
    # has no such mark.
    clean = AutoConfig.for_model(**quantised.config.to_diff_dict() | {"model_type": quantised.config.model_type})
    if hasattr(clean, "quantization_config"):
        del clean.quantization_config
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(quantised.state_dict())
    with files.atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _check_size(folder: Path, elements: int) -> None:
    """Refuse a file whose metadata describe a larger model than it holds. The model is built with meta tensors."""
    settings = AutoConfig.from_pretrained(folder, gguf_file=_NAME, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * elements:  # one matrix may serve as embeddings and as output layer
        raise ConversionError(f"it describes a model of {described} parameters, but holds {elements}.")


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_NAME,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=_NAME, trust_remote_code=False)
