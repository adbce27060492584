"""What an endpoint answered: a caption, or something that must not become one."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from vlv.data.readers.found import readable
from vlv.io import files

Kind = Literal["caption", "refused", "empty", "cut"]

# Refusals in the words of a chat model. Captions do not begin in the first person.
_REFUSAL = re.compile(
    r"\W*(?:(?:i['\u2019]?m|i am)\s+(?:\w+\s+)?(?:sorry|unable|not able|not allowed)|sorry\b|i\s+apologi[sz]e"
    r"|i\s+(?:can\s?not|can['\u2019]t|won['\u2019]t|will not|do not|don['\u2019]t|must decline)\b|as an ai\b"
    r"|unfortunately,?\s+i\b)",
    re.IGNORECASE,
)


class GarbageError(ValueError):
    """An answer that is not what a chat-completions endpoint gives."""


@dataclass(frozen=True)
class Answer:
    """One answer. `text` is the caption (blanks and line ends made one space) or what came in its place.

    Kinds: `refused` (by the API's own field, its content filter, or in words), `empty`, `cut` (at the token limit:
    half a sentence would teach a captioner to stop anywhere). `tokens`: prompt and completion; None where the
    endpoint does not say.
    """

    kind: Kind
    text: str
    tokens: tuple[int, int] | None


def parse(body: bytes) -> Answer:
    """Read the body of a chat completion.

    Raises:
        GarbageError: not JSON, or not of that form.
    """
    try:
        value = files.parse_json(body, "the answer")
        choice = value["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise GarbageError(f"no chat completion: {body[:200]!r} ({type(error).__name__})") from error
    text = " ".join(readable(_text(content)).split())
    tokens = _tokens(value.get("usage"))
    if refusal:
        return Answer("refused", readable(str(refusal)), tokens)
    if choice.get("finish_reason") == "content_filter":
        return Answer("refused", text or "content filter", tokens)
    if not text:
        return Answer("empty", "", tokens)
    if _REFUSAL.match(text):
        return Answer("refused", text, tokens)
    return Answer("cut" if choice.get("finish_reason") == "length" else "caption", text, tokens)


def _text(content: Any) -> str:
    """The content as text; some servers give it in parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if content is None or isinstance(content, str):
        return content or ""
    raise GarbageError(f"the message's content is {type(content).__name__}, not text")


def _tokens(usage: Any) -> tuple[int, int] | None:
    try:
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        return None
