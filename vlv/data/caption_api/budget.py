"""What captions cost, and a cap that is not passed, however many requests are under way."""

import threading
from dataclasses import dataclass

# Until an answer says how many tokens an image is, the first request goes alone and is taken to be so large.
_GUESSED_PROMPT_TOKENS = 4000
# Of two images the larger can be so many times the tokens of the largest seen.
_MARGIN = 2.0


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; 0 for a model of one's own."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, tokens: tuple[int, int]) -> float:
        """The price of so many prompt and completion tokens."""
        return (tokens[0] * self.prompt + tokens[1] * self.completion) / 1e6


class Budget:
    """Counts what is spent; thread-safe.

    A request is let through only if the cap holds even if it and all that are under way cost their most: twice the
    largest prompt so far and `max_tokens` of completion.

    Args:
        cap: not to be passed; None: no cap.
        spent: what earlier runs have cost.
        max_tokens: the completion's limit.
    """

    def __init__(self, prices: Prices, cap: float | None, spent: float, max_tokens: int) -> None:
        self._prices, self._cap, self._max_tokens = prices, cap, max_tokens
        self._largest: int | None = None
        self._reserved = 0.0
        self._under_way = 0
        self._change = threading.Condition()
        self.spent = spent

    def _most(self) -> float:
        prompt = _GUESSED_PROMPT_TOKENS if self._largest is None else round(self._largest * _MARGIN)
        return self._prices.of((prompt, self._max_tokens))

    def reserve(self) -> float | None:
        """Set aside what a request can cost; waits while others are under way, None once the cap is reached."""
        with self._change:
            while True:
                most = self._most()
                fits = self._cap is None or self.spent + self._reserved + most <= self._cap
                alone = self._cap is not None and self._largest is None and self._under_way
                if fits and not alone:
                    self._reserved += most
                    self._under_way += 1
                    return most
                if not self._under_way:
                    return None
                self._change.wait()

    def lose(self, reserved: float) -> bool:
        """A request may be billed without an answer: count its most. Whether the cap allows another attempt."""
        with self._change:
            self.spent += reserved
            return self._cap is None or self.spent + self._reserved <= self._cap

    def settle(self, reserved: float, tokens: tuple[int, int] | None, *, answered: bool) -> float:
        """A request has ended: its cost, by its tokens. Without them an answer costs what was reserved for it."""
        with self._change:
            self._reserved -= reserved
            self._under_way -= 1
            cost = 0.0
            if answered:
                cost = reserved if tokens is None else self._prices.of(tokens)
                self._largest = max(self._largest or 0, tokens[0] if tokens else _GUESSED_PROMPT_TOKENS)
            self.spent += cost
            self._change.notify_all()
            return cost
