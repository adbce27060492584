"""A GGUF file -> the same causal language model in Hugging Face form, once.

Quantised models are often published as GGUF. Reading one takes a minute and gives tensors of full precision, so this
is done once, and the result is stored as safetensors.
"""

import importlib.util
import mmap
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
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
            missing or do not match its tensors; or transformers knows no such language model.
    """
    if target.exists():
        raise ConversionError(f"{target} exists already; give another place, or remove it.")
    if not source.is_file():
        raise ConversionError(f"{source} is not a file; give a .gguf file.")
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF through it
        raise ConversionError("Reading GGUF needs the package gguf: pip install gguf")

    header = read(source)
    # transformers reads a folder. The file gets one of its own, so that configurations and code beside it are not read.
    with tempfile.TemporaryDirectory(prefix="vlv-gguf-") as folder:
        (Path(folder) / _NAME).symlink_to(source.resolve())
        try:
            _check_size(Path(folder), header.elements)
            quantised, tokenizer = _load(Path(folder))
        except ConversionError as error:
            raise ConversionError(f"{source}: {error}") from error
        except Exception as error:  # for a damaged file the libraries raise errors of any kind
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


_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TOKENS = "tokenizer.ggml.tokens"
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Tensor:
    """One tensor: its dimensions, fastest-varying first, and its end in bytes from the start of the tensors."""

    dimensions: tuple[int, ...]
    end: int

    @property
    def elements(self) -> int:
        """The number of its elements."""
        result = 1
        for one in self.dimensions:
            result *= one
        return result


@dataclass(frozen=True)
class Header:
    """`values`: the metadata; for an array only its length. `tensors` by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())


def read(path: Path) -> Header:
    """Read and check the header of a causal language model.

    Raises:
        ConversionError: the file is not GGUF or is cut short, or sizes are missing or do not match the tensors.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(_Cursor(data))
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise ConversionError(f"{path} cannot be read as GGUF: {error}. Fetch the file again.") from error
    problem = _problem(header)
    if problem:
        raise ConversionError(f"{path} is not a language model that can be converted: {problem}.")
    return header


class _Cursor:
    """Reads forward; reading past the end raises ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))
        return value

    def text(self) -> str:
        return self._take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """A value; for an array its length, because its elements are skipped."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_format(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):  # each takes at least 8 bytes, so the end of the file stops this
                self.skip(self.number("Q"))
        else:
            self.skip(struct.calcsize("<" + _format(inner)) * count)
        return count

    def skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError("it ends inside its header")
        self._at += size

    def rest(self, alignment: int) -> int:
        """Bytes from the next multiple of `alignment` to the end."""
        return max(0, len(self._data) - -(-self._at // alignment) * alignment)

    def _take(self, size: int) -> bytes:
        start = self._at
        self.skip(size)
        return self._data[start : self._at]


def _format(kind: int) -> str:
    if kind not in _FORMATS:
        raise ValueError(f"a value has the type {kind}, which is not known")
    return _FORMATS[kind]


def _parse(cursor: _Cursor) -> Header:
    magic, version = cursor.number("4s"), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}, not with GGUF, version 2 or 3")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in values:
            raise ValueError(f"the key {key!r} is given twice")
        values[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        name = cursor.text()
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is given twice")
        tensors[name] = _tensor(cursor, name)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
        raise ValueError(f"its alignment is {alignment!r}")
    there, said = cursor.rest(alignment), max((tensor.end for tensor in tensors.values()), default=0)
    if said > there:
        raise ValueError(f"its tensors need {said} bytes, but {there} follow the header")
    return Header(values, tensors)


def _tensor(cursor: _Cursor, name: str) -> Tensor:
    rank = cursor.number("I")
    if rank > 4:
        raise ValueError(f"the tensor {name!r} has {rank} dimensions")
    dimensions = tuple(int(cursor.number("Q")) for _ in range(rank))
    kind, offset = cursor.number("I"), cursor.number("Q")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    elements = Tensor(dimensions, 0).elements
    return Tensor(dimensions, offset + -(-elements // block) * size)


def _problem(header: Header) -> str | None:
    """What is wrong with the sizes, if anything: each must be given and must match the tensors."""
    values, tensors = header.values, header.tensors
    kind = values.get("general.architecture")
    if not isinstance(kind, str):
        return "it names no general.architecture"
    words = tensors.get("token_embd.weight")
    if words is None or len(words.dimensions) != 2:
        return "it has no tensor token_embd.weight of two dimensions"
    found = [match for name in tensors if (match := _BLOCK.fullmatch(name))]
    inside = {match[2] for match in found}
    wide = {tensors[match[0]].dimensions[-1] for match in found if match[2] == "ffn_up.weight"}
    sizes = {
        f"{kind}.embedding_length": {words.dimensions[0]},
        f"{kind}.block_count": {len({int(match[1]) for match in found})},
        _TOKENS: {words.dimensions[1]},
    }
    if wide:  # half of it where the gate is in the same tensor
        sizes[f"{kind}.feed_forward_length"] = wide | {one // 2 for one in wide}
    for name, there in sizes.items():
        if values.get(name) not in there:
            return f"{name} is {values.get(name, 'missing')}, but its tensors have {max(there)}"
    heads = f"{kind}.attention.head_count"
    if inside & {"attn_q.weight", "attn_qkv.weight"} and not isinstance(values.get(heads), int):
        return f"{heads} is missing"
    return None
