"""Captions as they lie beside images: text or JSON files, and one of several by a named rule."""

from collections.abc import Sequence
from typing import Any

from vlv import files
from vlv.data.readers.found import rank
from vlv.data.readers.names import Rule

# Where a JSON object says what it shows, in the order in which we look.
_KEYS = ("caption", "captions", "text", "prompt", "description")
# Not kept of a foreign JSON object: what we write ourselves, and what may tell who took the picture, and where.
_LEFT_OUT = {*_KEYS, "exif", "key", "status", "error_message"}


def choose(captions: Sequence[str], rule: Rule, seed: int, name: str) -> int:
    """Which of several captions: the index. `seeded`: by a hash of seed and sample; `first`; `longest` (in
    characters, the first of equals)."""
    if rule == "first":
        return 0
    if rule == "longest":
        return max(range(len(captions)), key=lambda i: (len(captions[i]), -i))
    return int.from_bytes(rank(seed, name), "big") % len(captions)


def pick(value: Any, rule: Rule, seed: int, name: str) -> tuple[str | None, dict[str, Any]]:
    """A caption from text or a list of texts, and the others as `{"captions": [...]}` for the sample's JSON.

    Raises:
        ValueError: neither of them.
    """
    if value is None:
        return None, {}
    if isinstance(value, str):
        return value, {}
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        if not value:
            return None, {}
        chosen = choose(value, rule, seed, name)
        others = [text for i, text in enumerate(value) if i != chosen]
        return value[chosen], {"captions": others} if others else {}
    raise ValueError(f"a caption must be text or a list of texts, not {type(value).__name__}")


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object beside an image.

    Raises:
        ValueError: not JSON, or no object.
    """
    value = files.parse_json(data, "the JSON beside the image", "Correct it.")
    if not isinstance(value, dict):
        raise ValueError("the JSON holds no object")
    return value


def of_json(value: dict[str, Any]) -> Any:
    """What a JSON object says about its image: text, a list, or None."""
    return next((value[key] for key in _KEYS if value.get(key)), None)


def facts(value: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a foreign JSON object that are worth keeping (URL, sizes, scores); NaN is left out."""
    return {
        key: one
        for key, one in value.items()
        if isinstance(one, str | int | float | bool) and key not in _LEFT_OUT and one == one
    }
