"""How a model computes a training step: its precision, and its blocks, which are recomputed or sharded as a whole.

transformers and diffusers name in each model the classes that must not be split over devices. These classes are the
model's layers, and their `forward` is always called as a whole.
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlv import rng
from vlv.config import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which `precision` applies: bf16 is torch's autocast to bfloat16, fp32 changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def names(module: nn.Module) -> list[str]:
    """Class names of the blocks that `module` contains."""
    present = {type(part).__name__ for part in module.modules()}
    named: set[str] = set()
    for part in module.modules():
        named |= set(getattr(part, "_no_split_modules", None) or ())
    return sorted(named & present)


def recompute(module: nn.Module) -> int:
    """Make each outermost block recompute its activations in the backward pass; returns the number of blocks.

    The libraries' own switches do not fit: transformers' works in training mode only, which turns dropout on. Here
    all parts, frozen and trainable, are in evaluation mode, so that a step depends on its RNG alone.
    """
    classes = set(names(module))

    def visit(part: nn.Module) -> int:
        if type(part).__name__ not in classes:
            return sum(visit(child) for child in part.children())
        part.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False, context_fn=rng.recomputed
        )
        return 1

    return visit(module)


def store_frozen_in_bf16(module: nn.Module) -> None:
    """Store the weights of frozen Linear and convolution layers in bfloat16: half the memory, the same results.

    Autocast rounds exactly these weights in each step. It does not round embeddings, biases and norms, so these stay
    in float32, and so does all that is trainable.
    """
    words = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}  # some heads share them
    for part in module.modules():
        if not isinstance(part, nn.Linear | nn.modules.conv._ConvNd) or id(part.weight) in words:
            continue
        if not part.weight.requires_grad:
            part.weight.data = part.weight.data.to(torch.bfloat16)
