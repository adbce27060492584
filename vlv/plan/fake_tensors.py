"""Models at full size whose tensors have a shape and a dtype, but no memory.

A model is built on the meta device. Here its tensors become fake tensors, that is, meta tensors that claim to be on
the CPU, as autograd and autocast require. For a training on a GPU, this module also replaces what a GPU does
differently: the attention kernel and the rules of mixed precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from vlv.config import Precision
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

Target = Literal["gpu", "cpu"]

# torch's rules for autocast on CUDA, for the functions that these models call: products in bfloat16; norms, softmax,
# powers and losses in float32. https://docs.pytorch.org/docs/stable/amp.html
_LOWER = {
    F.linear, F.conv2d, torch.conv2d, F.conv_transpose2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.bmm, torch.Tensor.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention,
}  # fmt: skip
_FLOAT = {
    F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax,
    torch.exp, torch.Tensor.exp, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, F.mse_loss,
    F.cross_entropy, F.log_softmax,
}  # fmt: skip


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all tensors of the module with fake tensors. Tied parameters stay tied."""
    made: dict[int, torch.Tensor] = {}
    kept = []  # ids are unique only among living objects

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            fake = fake_like(tensor, mode)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for owner in module.modules():
        tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
        for table in tables:
            table |= {name: replaced(tensor) for name, tensor in table.items() if tensor is not None}


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Return a fake tensor of the same shape and dtype."""
    with torch.no_grad():
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


def use_fused_attention(model: Autoencoder | Captioner) -> None:
    """Use the GPU's attention in a model that was built for a CPU.

    An encoder with dropout uses plain attention on both.
    """
    for name, part in model.named_modules():
        plain = name.startswith("encoder.") and model.encoder.drop_rate
        if isinstance(part, PreTrainedModel) and not plain:
            part.set_attn_implementation("sdpa")
    if isinstance(model, Autoencoder):
        model.decoder.use_fused_attention(True)


@contextmanager
def on_target(target: Target, precision: Precision) -> Iterator[None]:
    """Run a step of fake tensors as the target does: with its attention kernel and its mixed precision.

    Run the backward pass within it too, with `backward`: activations that are recomputed there need the same rules.
    """
    gpu = GpuAutocast() if target == "gpu" else torch.autocast("cpu", torch.bfloat16)
    with ReplacedFunctions(), gpu if precision == "bf16" else nullcontext():
        yield


def backward(loss: torch.Tensor) -> None:
    """Run the backward pass within the function modes that are active.

    `loss.backward()` would itself call the modes once and leave them before the pass begins. A gradient edge is not
    a tensor, so no mode intercepts the call.
    """
    torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones_like(loss))


class GpuAutocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16 for fake tensors.

    As in torch, the cast of a trainable weight is kept while the context is active.
    """

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


class ReplacedFunctions(TorchFunctionMode):
    """Replaces two functions.

    - `scaled_dot_product_attention` becomes the fused kernel that a GPU runs, which keeps no attention matrix. It is
      the memory-efficient kernel: it takes every dtype and mask, and keeps for the backward pass what the flash kernel
      keeps (query, key, value, output and one number for each row).
    - Indexing with a mask (`x[mask]`) takes everything. Fake tensors have no values, so their masks would select an
      unknown number of elements; in a simulated step each token of each caption has a label.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], FakeTensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].ndim - 1)
        return func(*args, **(kwargs or {}))


def _fused_attention(
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
    # The mask changes neither the FLOPs nor the kept bytes.
    result: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, query.requires_grad or key.requires_grad, dropout_p, is_causal, scale=scale
    )
    return result[0]
