"""A GGUF file -> the same causal language model in Hugging Face form, once.

GGUF is how quantised models are handed around. Reading one takes a minute and ends in full precision, so it is
done once and the result kept as safetensors.
"""

import importlib.util
import struct
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vlv import files
from vlv.converting.checkpoints import ConversionError


def convert(source: Path, target: Path) -> None:
    """Write `target` (config.json, bfloat16 safetensors, tokenizer) from the GGUF file `source`; atomic.

    Raises:
        ConversionError: `target` is there already, the reader is not installed, or the file is no language model
            that transformers knows.
    """
    if target.exists():
        raise ConversionError(f"{target} exists already; give another place, or remove it.")
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF through it
        raise ConversionError("Reading GGUF needs the package gguf: pip install gguf")
    try:
        quantised = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What transformers raises of a damaged file, of one without metadata, and of a quantisation it does not know.
    except (OSError, ValueError, KeyError, NotImplementedError, struct.error) as error:
        raise ConversionError(f"{source} cannot be read as a causal language model: {error}") from error
    # The loaded model remembers that it was quantised and refuses to be saved; the same weights under a
    # configuration without that memory do not.
    clean = AutoConfig.for_model(**quantised.config.to_diff_dict() | {"model_type": quantised.config.model_type})
    if hasattr(clean, "quantization_config"):
        del clean.quantization_config
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    with files.atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
