"""Data whose truth is known, so that the content of a caption or a picture can be counted right or wrong.

The configuration names the module that does so (`evaluate.counting`): `vlv.tiny.counting` for emoji scenes. It is
imported by this name, and its functions are roots of the evaluation's input hash (vlv.stages.inputs).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from vlv.evaluation.intervals import Terms

if TYPE_CHECKING:
    import torch


class Counting(Protocol):
    """The functions of such a module. What one sample shows is an object of the module's own."""

    def truth_of(self, meta: Mapping[str, Any]) -> Any:
        """What a sample shows, from its JSON; None if it is not known."""

    def is_held_out(self, meta: Mapping[str, Any]) -> bool:
        """Whether the sample shows a combination that is in no training set."""

    def read_captions(self, captions: Sequence[str]) -> list[Any]:
        """What N captions say that their images show."""

    def load_judge(self, folder: Path) -> "Callable[[torch.Tensor], list[Any]]":
        """A network that reads what pictures (N, 3, H, W) uint8 show; its weights are in `folder`."""

    def terms(self, read: Sequence[Any], true: Sequence[Any]) -> dict[str, Terms]:
        """Name of a count -> what was right and out of how many, (N, 2), for N samples."""


FUNCTIONS = ("truth_of", "is_held_out", "read_captions", "load_judge", "terms")


def load(module: str) -> Counting:
    """The module of this name, such as vlv.tiny.counting.

    Raises:
        ModuleNotFoundError: there is none.
    """
    return cast(Counting, importlib.import_module(module))
