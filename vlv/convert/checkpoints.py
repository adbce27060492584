"""Reading foreign checkpoints: the one place that opens torch's pickled files, and only their tensors.

`weights_only` makes torch refuse any pickle that would call something; nothing else in a checkpoint's folder is
opened, imported or run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from vlv.io import files

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")
# What a training script puts beside the weights; all of it is of no use to another trainer.
_BESIDE = {
    "step": "the step it was saved at",
    "optimizer_state_dict": "the optimizer's state",
    "scheduler_state_dict": "the schedule's state",
}
_STATE = "model_state_dict"


class ConversionError(RuntimeError):
    """A checkpoint that cannot be converted; the message names the file, the keys and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their own names, without a leading `module.`; `beside`: what else was there -> why it is dropped."""

    path: Path
    tensors: dict[str, torch.Tensor]
    beside: dict[str, str]


def read(path: Path) -> Checkpoint:
    """Read a checkpoint: a file, or the folder it lies in.

    A folder may hold safetensors or pytorch_model.bin (whole or in parts with an index; DeepSpeed's consolidation
    also makes a folder called pytorch_model.bin), model.pt, or checkpoint_N.pt (the largest N is taken).

    Raises:
        ConversionError: none of these, DeepSpeed's unconsolidated parts, a damaged file, or a pickle that is more
            than tensors.
    """
    found = _find(path)
    if found.name in _INDEXES:
        names = files.read_json_object(found, "Fetch the checkpoint again.").get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ConversionError(f"{found} has no weight_map of tensor names and files. Fetch the checkpoint again.")
        content: dict[str, Any] = {}
        for name in sorted(set(names.values())):
            if Path(name).name != name:
                raise ConversionError(f"{found} names {name!r}, which is not a file beside it; nothing was read.")
            content |= _load(found.parent / name)
    else:
        content = _load(found)
    beside = {}
    if _STATE in content:
        unknown = sorted(content.keys() - _BESIDE.keys() - {_STATE})
        if unknown:
            raise ConversionError(f"{found} holds {unknown} beside {_STATE!r}: not a layout that is known here.")
        beside = {key: _BESIDE[key] for key in content if key != _STATE}
        content = content[_STATE]
    return Checkpoint(found, _without_wrapper(_only_tensors(content, found)), beside)


def _find(path: Path) -> Path:
    if not path.exists():
        raise ConversionError(f"{path} does not exist.")
    if path.is_file():
        return path
    for name in (*_INDEXES, *_FILES):
        if (path / name).is_file():
            return path / name
    if (path / "pytorch_model.bin").is_dir():
        return _find(path / "pytorch_model.bin")
    numbered = {int(p.stem.removeprefix("checkpoint_")): p for p in path.glob("checkpoint_*.pt") if _is_numbered(p)}
    if numbered:
        return numbered[max(numbered)]
    if any(path.rglob("*_optim_states.pt")) or any(path.rglob("*_model_states.pt")):
        raise ConversionError(
            f"{path} holds DeepSpeed's parts, not a consolidated checkpoint. Consolidate them with DeepSpeed's own "
            "tool (python -m deepspeed.utils.zero_to_fp32 FOLDER OUTPUT); a script found in the folder is not run."
        )
    raise ConversionError(f"{path} holds none of {', '.join((*_INDEXES, *_FILES))}, checkpoint_N.pt.")


def _is_numbered(path: Path) -> bool:
    return path.stem.removeprefix("checkpoint_").isdecimal()


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # unpickling has errors of many kinds, and none of them is a bug of ours
        first = str(error).strip().split("\n")[0]
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors, and was not unpickled ({first})."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def _only_tensors(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(f"{path}: not tensors, and so not a state dict that is known here: {others[:8]}")
    return content


def _without_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the `module.` that a wrapped model puts before every name."""
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
