"""AdamW with learning rates by parameter group, the LR schedule, and the moving average of the weights."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from vlv.config import Optimizer
from vlv.training import distributed


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `parameters`. The longest prefix in `group_rates` that fits a parameter's name sets its learning rate.

    Raises:
        ValueError: a prefix fits no parameter. (Otherwise a misspelt name would silently train at another rate.)
    """
    prefixes = sorted(settings.group_rates, key=len, reverse=True)
    members: dict[float, list[nn.Parameter]] = {}
    used = set()
    for name, parameter in parameters.items():
        prefix = next((p for p in prefixes if name == p or name.startswith(f"{p}.")), None)
        used.add(prefix)
        rate = settings.group_rates[prefix] if prefix else settings.learning_rate
        members.setdefault(rate, []).append(parameter)
    if unused := [p for p in prefixes if p not in used]:
        raise ValueError(
            f"optimizer.group_rates names {unused}, but the name of no trainable parameter begins with it; "
            f"they begin with: {sorted({name.split('.')[0] for name in parameters})}"
        )
    groups = [{"params": group, "lr": rate, "base_rate": rate} for rate, group in members.items()]
    # fused: one kernel for all tensors, because a loop over many small tensors costs more than the arithmetic
    return torch.optim.AdamW(
        groups,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def rate_share(settings: Optimizer, step: int, steps: int) -> float:
    """The LR schedule: learning rate at `step` (0-based) of `steps` / full learning rate, in [0, 1].

    A linear warm-up is multiplied by the schedule of `settings`.
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = step / max(1, steps)
    final = settings.final_rate_share
    if settings.schedule == "constant":
        share = 1.0
    elif settings.schedule == "cosine":
        share = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        hold = settings.hold_share
        share = max(final, min(1.0, (1 - done) / (1 - hold)) if hold < 1 else 1.0)
    return warmup * share


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to `share` of its full learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * share


class WeightAverage:
    """Exponential moving average (EMA) of the trained weights. Its window is short at first, to forget the start.

    Attributes:
        tensors: the averages, sharded as the parameters are; empty where `decay` is 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Continue with the averages of a checkpoint."""
        for name, tensor in self.tensors.items():
            own = distributed.local_shard(tensor)
            own.copy_(distributed.local_shard(distributed.shard_like(saved[name], tensor)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after `step` (1-based)."""
        if not self.tensors:
            return
        decay = min(self._decay, step / (step + 10))
        current = [distributed.local_shard(self._parameters[name].detach()) for name in self.tensors]
        torch._foreach_lerp_([distributed.local_shard(tensor) for tensor in self.tensors.values()], current, 1 - decay)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Replace the weights by their averages."""
        for name, tensor in self.tensors.items():
            self._parameters[name].copy_(tensor)
