"""Which split an image goes to: a function of its pixels and a seed, so that more images move none of the others."""

import hashlib
from dataclasses import dataclass
from typing import get_args

from vlv.data.readers.found import Split

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Shares:
    """Parts of the images that are held out; the rest is for training."""

    validation: float = 0.02
    test: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"shares {self.validation} and {self.test}: not negative, together below 1")

    def position(self, content: str) -> float:
        """Where an image (hex hash of its pixels) lies in [0, 1): validation at the lower end, test at the upper."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{content}".encode()).digest()[:6], "big") / 2**48

    def split_of(self, content: str) -> Split:
        """The split of an image."""
        position = self.position(content)
        if position < self.validation:
            return "validation"
        return "test" if position >= 1 - self.test else "train"

    def wanted(self) -> set[Split]:
        """Splits that are to have images."""
        shares: dict[Split, float] = {"train": 1.0, "validation": self.validation, "test": self.test}
        return {split for split, share in shares.items() if share}

    def filled(self, contents: list[str]) -> dict[str, Split]:
        """The splits of a small set: as `split_of`, but each gets an image if there are enough.

        What lies lowest goes to validation and what lies highest to test. This is the one case in which a later
        image can move an earlier one: a set in which some split would otherwise be empty.
        """
        order = sorted(contents, key=self.position)
        if len(order) < len(self.wanted()):
            return dict.fromkeys(order, "train")
        chosen = {content: self.split_of(content) for content in order}
        if self.validation:
            chosen[order[0]] = "validation"
        if self.test:
            chosen[order[-1]] = "test"
        if "train" not in chosen.values():
            chosen[order[len(order) // 2]] = "train"
        return chosen
