"""Checkpoints in the middle of a stage: all state, verified, atomic, the newest two kept.

A checkpoint is a folder step-NNNNNNNN with weights, optimizer state and averages as safetensors and
state.json; its manifest with the hash of each file is written last, and the folder is renamed into place.
Whatever kills the writer, the newest folder that verifies is whole. Randomness needs no state: every draw is a
function of (seed, step).
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vlv import files

log = logging.getLogger(__name__)

_KEEP = 2
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this training."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` finished steps. `fingerprint` names the training it belongs to."""

    step: int
    fingerprint: str
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]


def _to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write atomically and drop all but the newest two. A full disk raises `OSError` and harms no older one."""
    target = folder / f"step-{checkpoint.step:08d}"
    with files.atomic_folder(target) as temporary:
        for name in ("weights", "optimizer", "averages"):
            safetensors.torch.save_file(_to_cpu(getattr(checkpoint, name)), temporary / f"{name}.safetensors")
        files.write_json(temporary / "state.json", {"step": checkpoint.step, "fingerprint": checkpoint.fingerprint})
        hashes = {file.name: files.sha256_file(file) for file in sorted(temporary.iterdir())}
        files.write_json(temporary / _MANIFEST, hashes)
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)
    return target


def _verifies(folder: Path) -> bool:
    try:
        hashes: dict[str, str] = files.read_json(folder / _MANIFEST)
        return all(files.sha256_file(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False


def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. Damaged ones are passed over with a warning.

    Raises:
        CheckpointError: it was written by a training with other settings or data.
    """
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if not _verifies(candidate):
            log.warning("%s is damaged; going back to the one before it", candidate)
            continue
        state: dict[str, Any] = files.read_json(candidate / "state.json")
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{candidate} belongs to a training with other settings, data or base models. "
                f"Move or delete {folder} to start anew."
            )
        parts = [
            safetensors.torch.load_file(candidate / f"{name}.safetensors")
            for name in ("weights", "optimizer", "averages")
        ]
        return Checkpoint(state["step"], state["fingerprint"], *parts)
    return None


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
    """Inverse of `optimizer_tensors`."""
    for name, parameter in parameters.items():
        state = {}
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = tensors[f"{name}/{key}"]
            state[key] = value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
        optimizer.state[parameter] = state


def restore_weights(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into `parameters`; the names must be exactly the same.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.
    """
    missing, unexpected = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    if missing or unexpected:
        raise CheckpointError(f"weights do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(f"{name}: saved {tuple(tensors[name].shape)}, model {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])
