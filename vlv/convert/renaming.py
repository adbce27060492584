"""Renaming tensors by a table of rules, strictly: a name that no rule knows is an error."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vlv.convert.checkpoints import ConversionError

_SHOWN = 8


@dataclass(frozen=True)
class Rule:
    r"""What becomes of the names that `pattern` matches as a whole.

    Attributes:
        target: the new name, \1, \2 ... standing for the pattern's groups; None: dropped.
        reason: why it is dropped.
        transposed: the tensor is stored the other way round.
        zero: dropped only if it holds nothing but zeros.
    """

    pattern: str
    target: str | None
    reason: str = ""
    transposed: bool = False
    zero: bool = False

    def under(self, pattern: str, target: str) -> "Rule":
        """The same rule for names that begin with `pattern`, whose new names begin with `target`."""
        new = None if self.target is None else target + self.target
        return Rule(pattern + self.pattern, new, self.reason, self.transposed, self.zero)


@dataclass
class Renamed:
    """Tensors by their new names, the old name of each, and what was dropped, old name -> reason."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def rename(tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule], what: str) -> Renamed:
    """Apply the first rule that fits each name; `what` is what an error calls the checkpoint.

    Raises:
        ConversionError: names that no rule knows; two tensors for one name that differ; a tensor that should be
            zero and is not.
    """
    result = Renamed()
    unknown = []
    for old, tensor in tensors.items():
        found = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, old))), None)
        if found is None:
            unknown.append(old)
            continue
        rule, match = found
        if rule.target is None:
            if rule.zero and tensor.count_nonzero():
                raise ConversionError(f"{what}: {old} is not zero; dropping it ({rule.reason}) would change the model.")
            result.dropped[old] = rule.reason
            continue
        new = match.expand(rule.target)
        value = tensor.T if rule.transposed else tensor
        if new in result.tensors and not torch.equal(result.tensors[new], value):
            raise ConversionError(f"{what}: {result.origin[new]} and {old} should be one tensor, but they differ.")
        result.tensors.setdefault(new, value)
        result.origin.setdefault(new, old)
    if unknown:
        raise ConversionError(
            f"{what} has {len(unknown)} tensors of unknown names: {some(unknown)}. Nothing was written."
        )
    return result


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
