"""Reads captions from text, lists and JSON, and chooses one of several by a named rule."""

import math
from collections.abc import Sequence
from typing import Any

from vlv.data.readers.formats import Rule
from vlv.data.readers.found import is_text, rank
from vlv.io import files

CONVERSATIONS = "conversations"  # LLaVA's: what a person asked about an image, and the answers

# Keys and columns that hold a caption, in the order in which we look.
NAMES = ("caption", "captions", "text", "txt", "prompt", "description", "recaption", CONVERSATIONS)
# Keys of a JSON object that are not kept: our own, and those that may tell who took the picture, and where.
_LEFT_OUT = {*NAMES, "exif", "key", "status", "error_message"}


def choose(captions: Sequence[str], rule: Rule, seed: int, name: str) -> int:
    """The index of the caption that the rule chooses.

    `seeded`: by a hash of seed and sample. `longest`: in characters; the first of equal ones.
    """
    if rule == "first":
        return 0
    if rule == "longest":
        return max(range(len(captions)), key=lambda i: (len(captions[i]), -i))
    return int.from_bytes(rank(seed, name), "big") % len(captions)


def pick(value: Any, rule: Rule, seed: int, name: str) -> tuple[str | None, dict[str, Any]]:
    """The caption in a text, a list of texts or a conversation of LLaVA.

    Returns:
        The caption (None if there is none), and the other captions as `{"captions": [...]}` for the sample's JSON.

    Raises:
        ValueError: another type of value, a conversation of several answers, or a text with a lone surrogate.
    """
    if value is None:
        return None, {}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = answer(value)
    texts = [value] if isinstance(value, str) else value
    if is_list_of_texts(texts):
        if not texts:
            return None, {}
        if not all(is_text(one) for one in texts):
            raise ValueError("the caption holds half a character (a lone surrogate)")
        if isinstance(value, str):
            return value, {}
        chosen = choose(value, rule, seed, name)
        others = [text for i, text in enumerate(value) if i != chosen]
        return value[chosen], {"captions": others} if others else {}
    raise ValueError(f"a caption must be text or a list of texts, not {type(value).__name__}")


def is_list_of_texts(value: Any) -> bool:
    """Whether a value is a list whose items are all texts."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def answer(conversation: list[Any]) -> str:
    """The answer in a conversation of LLaVA's form, [{from: human, value}, {from: gpt, value}].

    Raises:
        ValueError: there is not exactly one answer. None of several answers describes the whole image.
    """
    answers = [turn.get("value") for turn in conversation if isinstance(turn, dict) and turn.get("from") == "gpt"]
    if len(answers) != 1 or not isinstance(answers[0], str):
        raise ValueError(f"a conversation of {len(answers)} answers instead of one is not a caption")
    return answers[0]


def parse_json(data: bytes | str, name: str = "the JSON beside the image") -> dict[str, Any]:
    """A JSON object beside an image. Errors call it `name`.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    value = files.parse_json(data, name, "Correct it.")
    if not isinstance(value, dict):
        raise ValueError("the JSON holds no object")
    return value


def of_json(value: dict[str, Any]) -> Any:
    """The caption or captions in a JSON object: a text, a list, or None."""
    return next((value[key] for key in NAMES if value.get(key)), None)


def facts(value: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a JSON object that are kept (URL, sizes, scores).

    NaN, Infinity and texts with a lone surrogate are left out, because they cannot be written again.
    """
    return {key: one for key, one in value.items() if key not in _LEFT_OUT and is_text(key) and _is_plain(one)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return is_text(value)
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
