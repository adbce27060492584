"""AdamW's state under DeepSpeed ZeRO 2, which keeps it in flat pieces of its own, as named tensors and back.

Written against DeepSpeed's documentation (its "tensor fragment" functions); not run here, where there is no GPU.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """NAME/exp_avg, NAME/exp_avg_sq, NAME/step, whole; all processes must ask."""
    read = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
    (step,) = {float(state["step"]) for state in _states(optimizer)}
    result: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            result[f"{name}/{moment}"] = read(parameter, moment)
        result[f"{name}/step"] = torch.tensor(step)
    return result


def restore_optimizer(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    write = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            write(parameter, tensors[f"{name}/{moment}"].to(parameter.device), moment)
    step = tensors[f"{next(iter(parameters))}/step"]
    for state in _states(optimizer):
        state["step"] = step.to(state["step"].device) if isinstance(state["step"], torch.Tensor) else float(step)


def _states(optimizer: Any) -> list[dict[str, Any]]:
    """AdamW's own states, below accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return list(optimizer.state.values())
