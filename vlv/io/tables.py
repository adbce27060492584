"""Nested results as flat keys, and Markdown tables, for display and logs. Nothing is computed here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested mappings under dotted keys; lists, strings and booleans are left out."""
    return {
        key: float(value)
        for key, value in flatten(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. None is an empty cell; line ends and bars in a cell do not break the table."""
    return "\n".join([_row(columns), "|" + "---|" * len(columns), *map(_row, rows)])


def _row(cells: Sequence[object]) -> str:
    texts = ["" if cell is None else " ".join(str(cell).replace("|", "\\|").split()) for cell in cells]
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)
