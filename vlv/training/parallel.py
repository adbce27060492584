"""What several processes hold together: sharded tensors made whole and back, and numbers they agree on."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlv.training import runtime


def agree(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of `values` over all processes, in double precision; every process gets the same."""
    if runtime.world() == 1:
        return list(values)
    together = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(together)
    return [float(value) for value in together.tolist()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard; all processes must ask. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies here, in the same memory; others are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor on the device of `like`, and sharded as that is. Every process has the full one: none is sent."""
    placed = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU of the main process (others get none); one at a time, so that none fills a GPU."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if runtime.is_main():
            gathered[name] = full.to("cpu").contiguous()
    return gathered


def unshard(module: nn.Module) -> None:
    """Put full parameters, on the CPU of the main process, in the place of sharded ones that learn.

    The module can then be saved, but no longer run: for the end of a training.
    """
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.requires_grad or not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:  # tied ones stay tied
                full = whole(parameter.detach())
                made[id(parameter)] = nn.Parameter(full.to("cpu")) if runtime.is_main() else parameter
            setattr(owner, leaf, made[id(parameter)])
