"""The cost of captions, and a cap that it never exceeds, however many requests are in progress."""

import threading
from dataclasses import dataclass

# The assumed tokens of a prompt until the first answer reports them. With a cap, the first request is sent alone.
_GUESSED_PROMPT_TOKENS = 4000
# The next prompt has at most this many times the tokens of the largest prompt so far.
_MARGIN = 2.0


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; 0 for your own model."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, tokens: tuple[int, int]) -> float:
        """The price of (prompt tokens, completion tokens)."""
        return (tokens[0] * self.prompt + tokens[1] * self.completion) / 1e6


class Budget:
    """Counts the cost; thread-safe.

    A request is allowed only if the cost stays within the cap even when this request and all requests in progress cost
    their maximum: twice the largest prompt so far, and `max_tokens` of completion.

    Args:
        cap: the largest cost of all runs; None: no cap.
        spent: the cost of earlier runs.
        max_tokens: the largest number of tokens in a completion.
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
        """Reserve the maximum cost of a request; None if the cap is reached.

        Waits while requests in progress may still leave enough.
        """
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
        """Count the maximum cost of an attempt that may be billed without an answer; True if another one is allowed."""
        with self._change:
            self.spent += reserved
            return self._cap is None or self.spent + self._reserved <= self._cap

    def settle(self, reserved: float, tokens: tuple[int, int] | None, *, answered: bool) -> float:
        """End a request and return its cost, computed from its tokens. Without tokens an answer costs its reserve."""
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
