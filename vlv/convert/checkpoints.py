"""Reads other projects' checkpoints and renames their tensors.

This is the only module that opens torch's pickled files. With `weights_only` torch refuses a pickle that would call a
function, and nothing else in a checkpoint's folder is opened, imported or run. Tensors are renamed by a table of rules;
a name that no rule matches is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from vlv.io import files

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")
# What a training script stores beside the weights. Another trainer cannot use any of it.
_BESIDE = {
    "step": "the step it was saved at",
    "optimizer_state_dict": "the optimizer's state",
    "scheduler_state_dict": "the schedule's state",
}
_STATE = "model_state_dict"
_SHOWN = 8  # names in an error


class ConversionError(RuntimeError):
    """A checkpoint that cannot be converted; the message names the file, the keys and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their names, without a leading `module.`; `beside`: name of other content -> why it is dropped."""

    path: Path
    tensors: dict[str, torch.Tensor]
    beside: dict[str, str]


def read(path: Path) -> Checkpoint:
    """Read a checkpoint: a file, or the folder it lies in.

    A folder may hold safetensors or pytorch_model.bin (whole or in parts with an index; DeepSpeed's consolidation
    also makes a folder called pytorch_model.bin), model.pt, or checkpoint_N.pt (the largest N is taken).

    Raises:
        ConversionError: none of these is there, DeepSpeed's parts are not consolidated, a file is damaged, or a pickle
            holds more than tensors.
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
            raise ConversionError(f"{found} holds {unknown} beside {_STATE!r}: an unknown layout.")
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
    except Exception as error:  # unpickling a damaged file raises errors of many kinds
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
        raise ConversionError(f"{path} holds more than tensors, so it is not a known state dict: {others[:8]}")
    return content


def _without_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the `module.` that a wrapped model puts before every name."""
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


# -- renaming ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    r"""What happens to the tensors whose whole name matches `pattern`, a regular expression.

    Attributes:
        target: the new name, in which \1, \2 ... stand for the groups of the pattern; None: the tensor is dropped.
        reason: why it is dropped.
        transposed: the tensor is stored transposed.
        zero: it is dropped only if it holds nothing but zeros.
    """

    pattern: str
    target: str | None
    reason: str = ""
    transposed: bool = False
    zero: bool = False

    def under(self, pattern: str, target: str) -> "Rule":
        """The same rule for names that begin with `pattern`, whose new names begin with `target`."""
        new = None if self.target is None else target + self.target
        return Rule(pattern + self.pattern, new, self.reason, self.transposed, self.zero)


@dataclass
class Renamed:
    """Tensors by their new names, the old name of each, and what was dropped, old name -> reason."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def rename(tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule], what: str) -> Renamed:
    """Rename each tensor by the first rule that matches its name. Errors call the checkpoint `what`.

    Raises:
        ConversionError: a name that no rule matches; two different tensors for one name; a tensor that should be zero
            and is not.
    """
    result = Renamed()
    unknown = []
    for old, tensor in tensors.items():
        found = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, old))), None)
        if found is None:
            unknown.append(old)
            continue
        rule, match = found
        if rule.target is None:
            if rule.zero and tensor.count_nonzero():
                raise ConversionError(f"{what}: {old} is not zero; dropping it ({rule.reason}) would change the model.")
            result.dropped[old] = rule.reason
            continue
        new = match.expand(rule.target)
        value = tensor.T if rule.transposed else tensor
        if new in result.tensors and not torch.equal(result.tensors[new], value):
            raise ConversionError(f"{what}: {result.origin[new]} and {old} should be one tensor, but they differ.")
        result.tensors.setdefault(new, value)
        result.origin.setdefault(new, old)
    if unknown:
        raise ConversionError(
            f"{what} has {len(unknown)} tensors of unknown names: {some(unknown)}. Nothing was written."
        )
    return result


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
