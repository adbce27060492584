"""An accelerator that is not there: tensors on the device `pretend:0`, whose values lie in the CPU's memory.

What a GPU refuses is refused here, in a process that has no GPU: an operation on tensors of two devices, numpy's view
of one that is not the CPU's. Values are those of a CPU, so that results can be compared. torch is changed for good, so
it is a program: `python tests/pretend.py "run stage1" ...` runs `vlv run stage1` and so on with this accelerator.

torch's own means for a backend in Python: https://docs.pytorch.org/docs/stable/notes/extending.html and
`torch.utils.backend_registration`.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import library
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from vlv.cli import main as cli

NAME = "pretend"
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED_FROM_CPU = {_aten.index.Tensor, _aten.index_put_.default}  # a GPU takes a CPU's indices as well


class _Tensor(torch.Tensor):
    """On `pretend:0`; its values are `held`."""

    held: torch.Tensor
    operations = 0  # on all of them, in one command

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "_Tensor":
        made: _Tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        _Tensor.operations += 1
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cpu = [t for t in tensors if not isinstance(t, _Tensor) and t.dim() > 0]
        if on_cpu and function not in _BETWEEN_DEVICES | _INDEXED_FROM_CPU:
            raise RuntimeError(
                f"{function}: Expected all tensors to be on the same device, {NAME}:0 and cpu were found"
            )
        asked = kwargs.get("device")
        stays = asked is None or torch.device(asked).type == NAME
        on_host = kwargs if asked is None or not stays else kwargs | {"device": torch.device("cpu")}
        result = function(*tree_map(_held, args), **tree_map(_held, on_host))
        if function is _aten.copy_.default:
            return args[0]
        if not stays:
            return result
        made = tree_map(lambda value: _Tensor(value) if isinstance(value, torch.Tensor) else value, result)
        return return_and_correct_aliasing(function, args, kwargs, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _Tensor) else value


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> list[library.Library]:
    """Give torch this accelerator, for as long as the returned objects live."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # or tied tensors would be separated when they move
    kernels, autocast = library.Library("aten", "IMPL"), library.Library("_", "IMPL", "AutocastPrivateUse1")

    def empty(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
        return _Tensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return _Tensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _held(target).copy_(_held(source))
        return target

    kernels.impl("empty.memory_format", empty, "PrivateUse1")
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    autocast.fallback(library.fallthrough_kernel)  # float32 stays float32
    return [kernels, autocast]


if __name__ == "__main__":
    libraries = install()
    # accelerate finds only accelerators that it knows by name, and trainings take the device from it.
    PartialState().device = torch.device(NAME, 0)
    for command in sys.argv[1:]:
        _Tensor.operations = 0
        try:
            cli.app(shlex.split(command), prog_name="vlv")
        except SystemExit as ended:
            if ended.code:
                raise
        print(f"{_Tensor.operations} operations on {NAME}:0: {command}", file=sys.stderr)
