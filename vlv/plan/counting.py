"""Counting one module's share of a training step: FLOPs forward and backward, bytes kept for the backward pass.

A multiply-add is two FLOPs, as torch.utils.flop_counter has it: it counts matrix products, convolutions and
attention, and no element-wise work. Backward counts what is really computed: gradients of activations wherever
they lead to something that learns, gradients of weights only where the weights learn.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

Parts = Sequence[nn.Module | nn.Parameter]  # what holds a module's parameters
Run = Callable[..., torch.Tensor]

# What gradient checkpointing recomputes one at a time: the libraries' own blocks.
BLOCKS = (GradientCheckpointingLayer, ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock)


@dataclass(frozen=True)
class Cost:
    """One module's share of one sample.

    Attributes:
        forward, backward: FLOPs. recomputed: FLOPs of the second forward, 0 without gradient checkpointing.
        kept: bytes held from the forward to the backward pass, as configured.
        kept_whole, kept_recomputed: the same without and with gradient checkpointing.
        parameters, learning: counts.
        prepared: computed once an image before the training and read from a cache in the step.
        stored: bytes that one image takes in that cache (bfloat16); 0 where there is none.
    """

    name: str
    forward: int
    backward: int
    recomputed: int
    kept_whole: int
    kept_recomputed: int
    parameters: int
    learning: int
    recompute: bool = False
    prepared: bool = False
    stored: int = 0

    @property
    def kept(self) -> int:
        return self.kept_recomputed if self.recompute else self.kept_whole

    @property
    def flops(self) -> int:
        """FLOPs in the step."""
        return 0 if self.prepared else self.forward + self.backward + self.recomputed


class Recorder(Protocol):
    """Follows a step module by module."""

    def __call__(self, name: str, parts: Parts, run: Run, *inputs: torch.Tensor) -> torch.Tensor:
        """Run one module of the step; `parts` hold its parameters."""
        ...


def straight(name: str, parts: Parts, run: Run, *inputs: torch.Tensor) -> torch.Tensor:
    """A `Recorder` that only runs."""
    return run(*inputs)


class Counter:
    """A `Recorder` that counts each module by itself: forward, then its own backward.

    Args:
        recompute: names of the modules that gradient checkpointing covers.
        prepared: names of the modules whose outputs are cached.
        flops: False counts bytes and parameters only, and runs no backward pass.
    """

    def __init__(self, recompute: Sequence[str] = (), prepared: Sequence[str] = (), *, flops: bool = True) -> None:
        self.costs: list[Cost] = []
        self.outputs: dict[str, torch.Tensor] = {}  # of the prepared modules
        self._recompute, self._prepared, self._flops = recompute, prepared, flops

    def __call__(self, name: str, parts: Parts, run: Run, *inputs: torch.Tensor) -> torch.Tensor:
        parameters = _parameters(parts)
        learning = [p for p in parameters if p.requires_grad]
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        blocks = [m for part in parts if isinstance(part, nn.Module) for m in part.modules() if isinstance(m, BLOCKS)]
        kept = Kept(parameters, blocks)
        forward = _counting()
        with forward if self._flops else nullcontext(), kept:
            output = run(*leaves)
        backward = 0
        if self._flops and output.requires_grad:
            wanted = [x for x in leaves if x.requires_grad] + learning
            with _counting() as counted:
                torch.autograd.grad(output, wanted, torch.empty_like(output), allow_unused=True)
            backward = counted.get_total_flops()
        flops = forward.get_total_flops()
        recompute = name in self._recompute and output.requires_grad
        whole, recomputed = (kept.whole(), kept.recomputed()) if output.requires_grad else (0, 0)
        prepared = name in self._prepared
        stored = output.numel() // len(output) * torch.bfloat16.itemsize if prepared else 0
        self.costs.append(
            Cost(
                name, flops, backward, flops if recompute else 0, whole, recomputed,
                sum(p.numel() for p in parameters), sum(p.numel() for p in learning),
                recompute, prepared, stored,
            )
        )  # fmt: skip
        if prepared:
            self.outputs[name] = output
        return output


def _counting() -> FlopCounterMode:
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    return FlopCounterMode(display=False, custom_mapping={backward: _attention_backward})


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Four products, as of plain attention: the scores that the fused kernel computes again are its own affair."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * 2 * (width + value[3])


def _parameters(parts: Parts) -> list[nn.Parameter]:
    found = [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
    return list({id(p): p for p in found}.values())


class Kept:
    """Within it, notes what autograd keeps for the backward pass, each storage once; parameters are not counted."""

    def __init__(self, parameters: Sequence[nn.Parameter], blocks: Sequence[nn.Module]) -> None:
        self._own = {p.untyped_storage()._cdata for p in parameters}
        self._outside: dict[int, torch.Tensor] = {}
        self._inside: list[dict[int, torch.Tensor]] = []
        self._inputs: dict[int, torch.Tensor] = {}
        self._blocks, self._depth = blocks, 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._handles: list[Any] = []

    def __enter__(self) -> "Kept":
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._end))
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._inside.append({})
            self._inputs |= {_key(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}

    def _end(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        if _key(tensor) not in self._own:
            table = self._inside[-1] if self._depth else self._outside
            table[_key(tensor)] = tensor
        return tensor

    def whole(self) -> int:
        """Bytes without gradient checkpointing."""
        return _bytes([self._outside, *self._inside])

    def recomputed(self) -> int:
        """Bytes with it: the blocks' inputs, what lies between blocks, and the largest block while it is redone."""
        return _bytes([self._outside, self._inputs]) + max((_bytes([block]) for block in self._inside), default=0)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tables: Sequence[dict[int, torch.Tensor]]) -> int:
    merged = {key: tensor for table in tables for key, tensor in table.items()}
    return sum(tensor.untyped_storage().nbytes() for tensor in merged.values())


class LiveBytes(TorchDispatchMode):
    """Within it, follows how many bytes are allocated and not yet freed. `peak` is the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._living: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and _key(made) not in before:
                self._note(made)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return

        def freed(_: object) -> None:
            del self._living[key]
            self._now -= size

        self._living[key] = weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)
