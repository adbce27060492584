"""AdamW with learning rates by parameter group, its schedule, and the moving average of weights."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from vlv.config import Optimizer
from vlv.training import parallel


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `parameters`; each takes the rate of the longest prefix in `group_rates` that fits its name.

    Raises:
        ValueError: a prefix that fits no parameter (a misspelt name would silently train at another rate).
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
            f"optimizer.group_rates names {unused}, but no learning parameter begins so; "
            f"they begin with: {sorted({name.split('.')[0] for name in parameters})}"
        )
    groups = [{"params": group, "lr": rate, "base_rate": rate} for rate, group in members.items()]
    # fused: one kernel for all tensors; the loop over many small tensors costs more than the arithmetic
    return torch.optim.AdamW(
        groups,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def rate_share(settings: Optimizer, step: int, steps: int) -> float:
    """The share of the full learning rate at `step` (0-based) of `steps`: linear warm-up, then the schedule."""
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
    """Set every group to `share` of its full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * share


class WeightAverage:
    """Exponential moving average of the trained weights; short at first so that the start is forgotten.

    Attributes:
        tensors: the averages, laid out as the parameters are; empty where `decay` is 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Take up averages where a checkpoint left them."""
        for name, tensor in self.tensors.items():
            own = parallel.own_part(tensor)
            own.copy_(parallel.own_part(parallel.laid_out(saved[name], tensor)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights as they are after `step` (1-based)."""
        if not self.tensors:
            return
        decay = min(self._decay, step / (step + 10))
        current = [parallel.own_part(self._parameters[name].detach()) for name in self.tensors]
        torch._foreach_lerp_([parallel.own_part(tensor) for tensor in self.tensors.values()], current, 1 - decay)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Put the averages in the place of the weights."""
        for name, tensor in self.tensors.items():
            self._parameters[name].copy_(tensor)
