"""Prefetching keeps the items and their order, and an error comes at its place."""

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from vlv.data.loader import prefetched

GPU = torch.device("cuda")  # only its name is asked for


class _Source:
    """Counts up; remembers how far it was asked and by which threads; fails at `bad`."""

    def __init__(self, bad: int | None = None, count: int | None = None) -> None:
        self.bad, self.count, self.asked, self.threads = bad, count, 0, set[int]()

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count():
            self.asked += 1
            self.threads.add(threading.get_ident())
            if number == self.bad:
                raise OSError(f"item {number}")
            if number == self.count:
                return
            yield number


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_all_items_in_their_order_to_the_end(device: torch.device) -> None:
    source = _Source(count=20)
    assert list(prefetched(iter(source), device)) == list(range(20))
    assert (threading.get_ident() in source.threads) == (device.type == "cpu")


def test_at_most_two_items_are_fetched_ahead() -> None:
    source = _Source()
    items = prefetched(iter(source), GPU)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()  # type: ignore[attr-defined]
    assert 5 <= source.asked <= 7
    assert not [one for one in threading.enumerate() if one.name.startswith("prefetch") and one.is_alive()]


def test_an_error_comes_after_the_items_before_it() -> None:
    items = prefetched(iter(_Source(bad=3)), GPU)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3"):
        next(items)
