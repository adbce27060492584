"""The blocks of a model: what is recomputed as one and sharded as one.

transformers and diffusers name in each model the classes that must not be split over devices; these are its
layers, and their `forward` is always called as a whole.
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlv import dropout


def names(module: nn.Module) -> list[str]:
    """Class names of the blocks that there are in `module`."""
    present = {type(part).__name__ for part in module.modules()}
    named: set[str] = set()
    for part in module.modules():
        named |= set(getattr(part, "_no_split_modules", None) or ())
    return sorted(named & present)


def recompute(module: nn.Module) -> int:
    """Let each outermost block compute its activations again in the backward pass; returns how many do.

    The libraries' own switches would not do: transformers' works in training mode only, where dropout is on, and
    here frozen and learning parts alike are in evaluation mode, so that a step is a function of its draws.
    """
    classes = set(names(module))

    def visit(part: nn.Module) -> int:
        if type(part).__name__ not in classes:
            return sum(visit(child) for child in part.children())
        part.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False, context_fn=dropout.recomputed
        )
        return 1

    return visit(module)


def store_frozen_in_bf16(module: nn.Module) -> None:
    """Weights of frozen Linear and convolution layers in bfloat16: half the memory, the same numbers.

    Autocast rounds these very weights in each step. Embeddings, biases and norms, which it leaves alone, and what
    learns stay in float32.
    """
    words = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}  # some heads share them
    for part in module.modules():
        if not isinstance(part, nn.Linear | nn.modules.conv._ConvNd) or id(part.weight) in words:
            continue
        if not part.weight.requires_grad:
            part.weight.data = part.weight.data.to(torch.bfloat16)
