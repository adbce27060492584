"""Which words of the captions the language model's tokenizer can hold.

A tokenizer holds a word if the word can be decoded again from its tokens. A word that it does not hold becomes the
unknown token or disappears, so the language model never sees it and can never write it. A tokenizer that falls back on
bytes holds every word.
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 1_000_000  # words whose answer is kept; a language in use has fewer
_SHOWN = 10


class Coverage(BaseModel):
    """How much of some captions a tokenizer holds. Words are separated by spaces.

    `captions_held` counts the captions whose words are all held. `unknown` has the most frequent words that are not
    held, with their counts.
    """

    words: int
    words_held: int
    captions: int
    captions_held: int
    unknown: dict[str, int]

    @property
    def share_of_words(self) -> float:
        """From 0 to 1; 1 if there is no word."""
        return self.words_held / self.words if self.words else 1.0

    @property
    def share_of_captions(self) -> float:
        """From 0 to 1; 1 if there is no caption."""
        return self.captions_held / self.captions if self.captions else 1.0

    def holds(self, share: float) -> bool:
        """Whether at least this share of the words, and of the captions, is held."""
        return min(self.share_of_words, self.share_of_captions) >= share

    def __str__(self) -> str:
        lost = ", ".join(f"{word!r} {count:,} times" for word, count in self.unknown.items())
        return (
            f"{self.words_held:,} of {self.words:,} words ({self.share_of_words:.1%}) and {self.captions_held:,} of "
            f"{self.captions:,} captions ({self.share_of_captions:.1%})" + (f"; not held: {lost}" if lost else "")
        )


class Vocabulary:
    """Tells for each word whether a tokenizer holds it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._holds = functools.lru_cache(_REMEMBERED)(self._look_up)

    def unknown(self, caption: str) -> list[str]:
        """The words of the caption that are not held, in their order."""
        return [word for word in caption.split() if not self._holds(word)]

    def _look_up(self, word: str) -> bool:
        """Whether a word can be decoded again: it has no unknown token and loses no letter or digit.

        Case, accents and punctuation may change, because some tokenizers change them on purpose.
        """
        ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids or self._tokenizer.unk_token_id in ids:
            return False
        return _letters(str(self._tokenizer.decode(ids))) == _letters(word)


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isalnum())


class Count:
    """Counts captions for a `Coverage`."""

    def __init__(self) -> None:
        self._words = self._captions = self._whole = 0
        self._unknown: Counter[str] = Counter()

    def add(self, caption: str, unknown: list[str]) -> None:
        """Add a caption, given its words that are not held."""
        self._words += len(caption.split())
        self._captions += 1
        self._whole += not unknown
        self._unknown.update(unknown)

    def coverage(self) -> Coverage:
        """The coverage of all captions so far."""
        return Coverage(
            words=self._words, words_held=self._words - self._unknown.total(), captions=self._captions,
            captions_held=self._whole, unknown=dict(self._unknown.most_common(_SHOWN)),
        )  # fmt: skip


def coverage(tokenizer: "PreTrainedTokenizerBase", captions: Iterable[str]) -> Coverage:
    """How much of `captions` the tokenizer holds."""
    vocabulary, count = Vocabulary(tokenizer), Count()
    for caption in captions:
        count.add(caption, vocabulary.unknown(caption))
    return count.coverage()
