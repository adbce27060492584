"""Checkpoints: the whole state of a training, verified and written atomically. The newest two are kept.

A checkpoint is a folder step-NNNNNNNN. It holds the weights, the optimizer's state and the weight averages as
safetensors, and state.json. The manifest with the hash of each file is written last; then the folder is renamed into
place. If the writer is killed at any point, the newest folder that verifies is complete. The RNG needs no state: every
random number is a function of (seed, step). The tensors are full ones (not sharded), so a training can resume with any
number of processes.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch

from vlv.io import files
from vlv.training import distributed

log = logging.getLogger(__name__)

_KEEP = 2
_MANIFEST = "manifest.json"
_FILES = {"weights.safetensors", "optimizer.safetensors", "averages.safetensors", "state.json"}


class CheckpointError(RuntimeError):
    """The checkpoint does not belong to this training."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` finished steps. `input_hash` names the training that it belongs to."""

    step: int
    input_hash: str
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    averages: Mapping[str, torch.Tensor]


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read on demand, so that several processes on one machine hold no copy each."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safetensors.safe_open)(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor.clone()  # it is a view of the mapped file, which is removed after newer checkpoints

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and remove all but the newest two.

    Raises:
        OSError: the disk is full. Older checkpoints stay as they are.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    with files.atomic_folder(target) as temporary:
        for name in ("weights", "optimizer", "averages"):
            tensors: Mapping[str, torch.Tensor] = getattr(checkpoint, name)
            contents = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contents, temporary / f"{name}.safetensors")
        files.write_json(temporary / "state.json", {"step": checkpoint.step, "input_hash": checkpoint.input_hash})
        hashes = {file.name: files.sha256_file(file) for file in sorted(temporary.iterdir())}
        files.write_json(temporary / _MANIFEST, hashes)
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)
    return target


def _verifies(folder: Path) -> bool:
    try:
        hashes = files.read_json_object(folder / _MANIFEST)
        return hashes.keys() == _FILES and all(
            files.sha256_file(folder / name) == digest for name, digest in hashes.items()
        )
    except (OSError, files.FileError):
        return False


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 if there is none. Damaged ones are skipped with a warning."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        number = candidate.name.removeprefix("step-")
        if number.isdecimal() and _verifies(candidate):
            return int(number)
        log.warning("%s is damaged; going back to the one before it", candidate)
    return 0


def load(folder: Path, step: int, input_hash: str) -> Checkpoint:
    """The checkpoint after `step` steps. Its tensors are read when they are used.

    Raises:
        CheckpointError: it is missing, or a training with other settings or data wrote it.
    """
    path = folder / f"step-{step:08d}"
    if not path.exists():
        raise CheckpointError(
            f"This process cannot find {path}. All machines need the project folder on a shared file system."
        )
    state = files.read_json_object(path / "state.json")
    if state.get("input_hash") != input_hash:
        raise CheckpointError(
            f"{path} belongs to a training with other settings, data or base models. "
            f"Move or delete {folder} to start again."
        )
    tensors = [_Stored(path / f"{name}.safetensors") for name in ("weights", "optimizer", "averages")]
    return Checkpoint(state["step"], state["input_hash"], *tensors)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors: NAME/exp_avg, NAME/exp_avg_sq, NAME/step."""
    result: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            result[f"{name}/{key}"] = value
    return result


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Inverse of `optimizer_tensors`, for parameters on a CPU, on a GPU, or sharded."""
    for name, parameter in parameters.items():
        state = {key: distributed.shard_like(tensors[f"{name}/{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
        step = tensors[f"{name}/step"]
        optimizer.state[parameter] = {**state, "step": step.to(parameter.device)}


def restore_weights(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into `parameters`. The names must be exactly the same.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.
    """
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        raise CheckpointError(f"weights do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = tensors[name]
            if parameter.shape != saved.shape:
                raise CheckpointError(f"{name}: saved {tuple(saved.shape)}, model {tuple(parameter.shape)}")
            parameter.copy_(saved)
