"""How much memory this process really used: of the GPU where there is one, else of its own."""

import threading
import types

import psutil
import torch

_SECONDS = 0.01  # between two looks at this process's memory; large blocks take longer to fill


class PeakMemory:
    """Within it, the most bytes in use since `restart`, less what was in use when it was made.

    On a GPU torch's allocator knows the peak. On a CPU a thread looks at this process's anonymous memory, so that
    files that are only mapped (weights being read) do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._before = self._most = self._now()

    def __enter__(self) -> "PeakMemory":
        if not self._cuda:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._ended.set()
        if self._watch.is_alive():
            self._watch.join()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._most = self._now()

    def peak(self) -> int:
        """Bytes."""
        most = torch.cuda.max_memory_allocated() if self._cuda else max(self._most, self._now())
        return most - self._before

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated()
        used = psutil.Process().memory_info()
        return int(used.rss - getattr(used, "shared", 0))

    def _look(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._most = max(self._most, self._now())
