"""Tidying captions of a model that was never taught where to end."""

import re

_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def clean_up(caption: str) -> str:
    """Cut after the last full stop (if there is one), and leave out each sentence that was there before.

    The release does this to every caption; ours end by themselves, and half a sentence is then a fault to be seen.
    """
    whole = caption[: caption.rfind(".") + 1] or caption
    return " ".join(dict.fromkeys(sentence for sentence in _BETWEEN_SENTENCES.split(whole) if sentence))
