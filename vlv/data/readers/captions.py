"""Captions as they lie beside images: text or JSON files, and one of several by a named rule."""

import math
from collections.abc import Sequence
from typing import Any

from vlv.data.readers.formats import Rule
from vlv.data.readers.found import is_text, rank
from vlv.io import files

CONVERSATIONS = "conversations"  # LLaVA's: what a person asked about an image, and the answers

# Where a JSON object or a table says what an image shows, in the order in which we look.
NAMES = ("caption", "captions", "text", "txt", "prompt", "description", "recaption", CONVERSATIONS)
# Not kept of a foreign JSON object: what we write ourselves, and what may tell who took the picture, and where.
_LEFT_OUT = {*NAMES, "exif", "key", "status", "error_message"}


def choose(captions: Sequence[str], rule: Rule, seed: int, name: str) -> int:
    """Which of several captions: the index. `seeded`: by a hash of seed and sample; `first`; `longest` (in
    characters, the first of equals)."""
    if rule == "first":
        return 0
    if rule == "longest":
        return max(range(len(captions)), key=lambda i: (len(captions[i]), -i))
    return int.from_bytes(rank(seed, name), "big") % len(captions)


def pick(value: Any, rule: Rule, seed: int, name: str) -> tuple[str | None, dict[str, Any]]:
    """A caption from text, a list of texts or LLaVA's conversation, and the others as `{"captions": [...]}` for the
    sample's JSON.

    Raises:
        ValueError: none of them, a conversation of several answers, or text with half characters in it.
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
    """Whether it is a list, and all of its items are texts."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def answer(conversation: list[Any]) -> str:
    """What a model said of an image in LLaVA's form, [{from: human, value}, {from: gpt, value}].

    Raises:
        ValueError: not one answer. Answers to several questions are no caption: none says what the whole image shows.
    """
    answers = [turn.get("value") for turn in conversation if isinstance(turn, dict) and turn.get("from") == "gpt"]
    if len(answers) != 1 or not isinstance(answers[0], str):
        raise ValueError(f"a conversation of {len(answers)} answers instead of one is no caption")
    return answers[0]


def parse_json(data: bytes | str, name: str = "the JSON beside the image") -> dict[str, Any]:
    """A JSON object beside an image; `name` is what an error calls it.

    Raises:
        ValueError: not JSON, or no object.
    """
    value = files.parse_json(data, name, "Correct it.")
    if not isinstance(value, dict):
        raise ValueError("the JSON holds no object")
    return value


def of_json(value: dict[str, Any]) -> Any:
    """What a JSON object says about its image: text, a list, or None."""
    return next((value[key] for key in NAMES if value.get(key)), None)


def facts(value: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a foreign JSON object that are worth keeping (URL, sizes, scores).

    Numbers that are none (NaN, Infinity) and half characters are left out: they could not be written again.
    """
    return {key: one for key, one in value.items() if key not in _LEFT_OUT and is_text(key) and _is_plain(one)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return is_text(value)
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
