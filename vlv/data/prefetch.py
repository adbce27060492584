"""Batches made ready in the background, while the device computes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_AHEAD = 2  # batches; more would only hold memory


def prefetched(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """`items`, in their order; on a device other than the CPU, each is fetched in a thread before it is asked for.

    Reading shards and decoding images then costs a GPU no time. A CPU has none to spare: there the thread would only
    take cores from the training. An error of `items` comes where its item would have come.
    """
    if device.type == "cpu":
        yield from items
        return
    end = object()
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        thread.shutdown(cancel_futures=True)
