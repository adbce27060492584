"""Full-size models that hold no numbers: every tensor has its shape and dtype, but no memory.

Models are built on the meta device; here their tensors become fake tensors (torch's meta tensors that pass for
those of a CPU, which autograd and autocast need). What a GPU does otherwise, its attention kernel and its rules for
mixed precision, is put in their place where a GPU is the target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vlv.config import Precision

Target = Literal["gpu", "cpu"]

# torch's rules for CUDA autocast, as far as these models call such functions: products in bf16; norms, softmax, powers
# and losses in float32. https://docs.pytorch.org/docs/stable/amp.html
_LOWER = {
    F.linear, F.conv2d, torch.conv2d, F.conv_transpose2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.bmm, torch.Tensor.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention,
}  # fmt: skip
_FLOAT = {
    F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax,
    torch.exp, torch.Tensor.exp, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, F.mse_loss,
    F.cross_entropy, F.log_softmax,
}  # fmt: skip


def stand_in(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of all of the module's tensors; what was tied stays tied."""
    made: dict[int, torch.Tensor] = {}
    kept = []  # ids are only unique among living objects

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            fake = like(tensor, mode)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for owner in module.modules():
        tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
        for table in tables:
            table |= {name: replaced(tensor) for name, tensor in table.items() if tensor is not None}


def like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of the same shape and dtype."""
    with torch.no_grad():
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


@contextmanager
def autocast(target: Target, precision: Precision) -> Iterator[None]:
    """What torch.autocast does on the target; fp32 is no autocast."""
    if precision == "fp32":
        yield
        return
    with GpuAutocast() if target == "gpu" else torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def on_target(target: Target, precision: Precision) -> Iterator[None]:
    """Within it, a model's forward runs as on the target: its attention kernel, its mixed precision."""
    with FusedAttention(), autocast(target, precision):
        yield


class GpuAutocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16 on stand-ins; casts of weights that learn are kept for the whole step, as there."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOWER:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif func in _FLOAT:
            args, kwargs = tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self._weights:
            self._weights[id(x)] = x, x.to(torch.bfloat16)
        return self._weights[id(x)][1]


def _float(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x


class FusedAttention(TorchFunctionMode):
    """Sends scaled_dot_product_attention to the fused kernel that a GPU runs, which keeps no attention matrix.

    The kernel is the memory-efficient one: it takes every dtype and mask, and keeps for the backward pass what
    the flash kernel keeps (query, key, value, output, one number a row).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    # The mask changes neither FLOPs nor what is kept.
    result: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, query.requires_grad or key.requires_grad, dropout_p, is_causal, scale=scale
    )
    return result[0]
