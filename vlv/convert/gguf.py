"""A GGUF file -> the same causal language model in Hugging Face form, once.

GGUF is how quantised models are handed around. Reading one takes a minute and ends in full precision, so it is
done once and the result kept as safetensors.
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
        ConversionError: `target` is there already, the reader is not installed, the file's sizes are missing or not
            those of its tensors, or it is no language model that transformers knows.
    """
    if target.exists():
        raise ConversionError(f"{target} exists already; give another place, or remove it.")
    if not source.is_file():
        raise ConversionError(f"{source} is not a file; give a .gguf file.")
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF through it
        raise ConversionError("Reading GGUF needs the package gguf: pip install gguf")
    from vlv.convert import gguf_header

    header = gguf_header.read(source)
    # transformers takes a folder, and would also look at what lies beside the file: configurations, tokenizers, code.
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
    # The loaded model remembers that it was quantised and refuses to be saved; the same weights under a
    # configuration without that memory do not.
    clean = AutoConfig.for_model(**quantised.config.to_diff_dict() | {"model_type": quantised.config.model_type})
    if hasattr(clean, "quantization_config"):
        del clean.quantization_config
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(quantised.state_dict())
    with files.atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _check_size(folder: Path, elements: int) -> None:
    """Refuse a file whose metadata describe a model that is not in it; the model is counted, not built."""
    settings = AutoConfig.from_pretrained(folder, gguf_file=_NAME, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * elements:  # the same matrix may stand for words at both ends
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
