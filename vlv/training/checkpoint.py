"""Checkpoints in the middle of a stage: all state, verified, atomic, the newest two kept.

A checkpoint is a folder step-NNNNNNNN with weights, optimizer state and averages as safetensors and
state.json; its manifest with the hash of each file is written last, and the folder is renamed into place.
Whatever kills the writer, the newest folder that verifies is whole. Randomness needs no state: every draw is a
function of (seed, step). Tensors are whole whatever the number of processes that trained, so any other number
can go on from them.
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
from vlv.training import parallel

log = logging.getLogger(__name__)

_KEEP = 2
_MANIFEST = "manifest.json"
_FILES = {"weights.safetensors", "optimizer.safetensors", "averages.safetensors", "state.json"}


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this training."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` finished steps. `fingerprint` names the training it belongs to."""

    step: int
    fingerprint: str
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    averages: Mapping[str, torch.Tensor]


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for: processes on one machine do not hold a copy each."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safetensors.safe_open)(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor.clone()  # what it gives is the mapped file, which goes when newer checkpoints come

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write atomically and drop all but the newest two. A full disk raises `OSError` and harms no older one."""
    target = folder / f"step-{checkpoint.step:08d}"
    with files.atomic_folder(target) as temporary:
        for name in ("weights", "optimizer", "averages"):
            tensors: Mapping[str, torch.Tensor] = getattr(checkpoint, name)
            contents = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contents, temporary / f"{name}.safetensors")
        files.write_json(temporary / "state.json", {"step": checkpoint.step, "fingerprint": checkpoint.fingerprint})
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
    """Steps of the newest checkpoint that verifies; 0 if there is none. Damaged ones are passed over with a warning."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        number = candidate.name.removeprefix("step-")
        if number.isdecimal() and _verifies(candidate):
            return int(number)
        log.warning("%s is damaged; going back to the one before it", candidate)
    return 0


def load(folder: Path, step: int, fingerprint: str) -> Checkpoint:
    """The checkpoint after `step` steps, its tensors still on disk.

    Raises:
        CheckpointError: it was written by a training with other settings or data, or it is not there.
    """
    path = folder / f"step-{step:08d}"
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there for this process. All machines need the project folder on a file system they share."
        )
    state = files.read_json_object(path / "state.json")
    if state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path} belongs to a training with other settings, data or base models. "
            f"Move or delete {folder} to start anew."
        )
    parts = [_Stored(path / f"{name}.safetensors") for name in ("weights", "optimizer", "averages")]
    return Checkpoint(state["step"], state["fingerprint"], *parts)


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
    """Inverse of `optimizer_tensors`, for parameters as they lie here: on a CPU, on a GPU, or sharded."""
    for name, parameter in parameters.items():
        state = {key: parallel.laid_out(tensors[f"{name}/{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
        step = tensors[f"{name}/step"]
        optimizer.state[parameter] = {**state, "step": step.to(parameter.device)}


def restore_weights(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into `parameters`; the names must be exactly the same.

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
