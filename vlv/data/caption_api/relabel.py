"""`caption_images` gets a caption for every image of a source from the captioning API.

It asks about each image once, even if it is killed and started again.
"""

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vlv.data.caption_api.answers import Exported, Journal, export, short
from vlv.data.caption_api.budget import Budget, Prices
from vlv.data.caption_api.client import (
    Answer,
    Client,
    EndpointError,
    NoAnswerError,
    Question,
    RejectedError,
    StoppedError,
)
from vlv.data.readers.formats import ReadOptions, open_source
from vlv.data.readers.found import Found, Reader
from vlv.io import files, images
from vlv.io.progress import Meter, meter

# The endpoint is at fault if this many images in a row get no answer, or are rejected before the first answer.
_FAILED_IN_A_ROW, _REJECTED_AT_FIRST = 10, 5
_EXAMPLES = 20


@dataclass(frozen=True)
class CaptionOptions:
    """What a run asks, and how.

    Attributes:
        cap: the largest cost of all runs into one folder; None: no cap.
        concurrency: requests at a time.
        longest_side: in pixels; larger images are scaled down before they are sent (as JPEG).
        limit: how many images this run asks about; None: all.
        again: ask again if the answer was no caption.
        sidecars: also write a .txt file beside each image (folders only).
        reading: how the source is read.
    """

    question: Question
    prices: Prices = field(default_factory=Prices)
    cap: float | None = None
    concurrency: int = 8
    longest_side: int = 1024
    limit: int | None = None
    again: bool = False
    sidecars: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class CaptionReport:
    """The result of a run.

    Attributes:
        counts: number of images by result: `caption`, `refused`, `empty`, `cut` (answered in this run),
            `answered_before`, `repeated` (the same file again), `unreadable`, `rejected`, `failed`. `lost` counts
            requests that may be billed without an answer.
        tokens: of prompts and of completions.
        notes: the first images without a caption: name, reason and message.
        stopped: why the run ended early; None if it did not.
        cost: of all runs.
        exported: the files that were made from the journal.
    """

    counts: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    stopped: str | None = None
    cost: float = 0.0
    exported: Exported | None = None

    @property
    def complete(self) -> bool:
        """Whether another run would find no image to ask about."""
        return self.stopped is None and not self.counts["failed"] and not self.counts["rejected"]


def caption_images(source: Path, output: Path, options: CaptionOptions) -> CaptionReport:
    """Ask for a caption of each image of `source` that has no answer in `output` yet.

    `output`/journal.jsonl is the record (vlv.data.caption_api.answers). At the end of each run, also of a stopped one,
    captions.parquet, unusable.jsonl and, if wanted, the texts beside the images are made from it.

    Raises:
        DataError: the source cannot be read, or `output` holds answers to another question.
        EndpointError: the endpoint cannot be used. Earlier answers are kept and exported.
        LockHeldError: another run writes to `output`.
    """
    with files.folder_lock(output, "vlv data caption"):
        reader = open_source(source, output / ".scratch", options.reading)
        question = options.question
        asked = {"model": question.model, "prompt": question.prompt, "longest_side": options.longest_side}
        journal = Journal(output / "journal.jsonl", asked, again=options.again)
        report = CaptionReport()
        try:
            _Run(options, journal, report).work(reader)
        finally:
            beside = source if options.sidecars and reader.format == "folder" else None
            report.exported = export(journal, output, beside)
        return report


class _CapReached(Exception):
    """Another attempt could exceed the cap."""


class _Run:
    def __init__(self, options: CaptionOptions, journal: Journal, report: CaptionReport) -> None:
        self._options, self._journal, self._report = options, journal, report
        self._lock = threading.Lock()
        self._enough = threading.Event()  # no more images; requests in progress continue
        self._stop = threading.Event()  # no more attempts either
        self._budget = Budget(options.prices, options.cap, journal.spent, options.question.max_tokens)
        self._client = Client(options.question, self._stop, options.concurrency)
        self._claimed: set[int] = set()  # by this run
        self._error: BaseException | None = None
        self._failed_in_a_row = 0

    def work(self, reader: Reader) -> None:
        """Ask about all images. An interrupt waits for the answers in progress, because they are paid for."""
        slots = threading.BoundedSemaphore(2 * self._options.concurrency)  # images that are loaded or in progress
        with meter("Captioning", reader.total()) as progress, ThreadPoolExecutor(self._options.concurrency) as pool:
            try:
                for found in reader.read():
                    slots.acquire()
                    if self._enough.is_set() or self._stop.is_set():
                        break
                    future = pool.submit(self._one, found, progress)
                    future.add_done_callback(self._done)
                    future.add_done_callback(lambda _: slots.release())
            except BaseException:
                self._stop.set()
                raise
            finally:
                pool.shutdown()
                self._client.close()
                self._report.cost = self._budget.spent
        if self._error is not None:
            raise self._error

    def _done(self, future: "Future[None]") -> None:
        error = future.exception()
        if error is not None and not isinstance(error, StoppedError):
            self._error = self._error or error
            self._stop.set()

    def _one(self, found: Found, progress: Meter) -> None:
        """Process one image, from its bytes to the journal."""
        try:
            if found.load is None:
                raise OSError(f"{found.reason}: {found.message}")
            data = found.load().image
            digest = files.sha256_bytes(data)
            if self._claim(digest):
                jpeg = images.encode_jpeg(images.shrink(images.decode(data, found.url), self._options.longest_side))
                self._ask(found.url, digest, jpeg)
        except (images.ImageError, OSError, ValueError) as error:
            self._note("unreadable", found.url, str(error))
        with self._lock:
            progress.advance(note=f"spent {self._budget.spent:.4g}" if self._budget.spent else "")

    def _claim(self, digest: str) -> bool:
        """Whether to ask about this image: it has no answer and no request is in progress."""
        key = short(digest)
        with self._lock:
            if key in self._journal.answered or key in self._claimed:
                self._report.counts["repeated" if key in self._claimed else "answered_before"] += 1
                return False
            if self._options.limit is not None and len(self._claimed) >= self._options.limit:
                self._end(f"the limit of {self._options.limit} images")
                return False
            if self._enough.is_set():
                return False
            self._claimed.add(key)
            return True

    def _end(self, reason: str) -> None:
        self._report.stopped = self._report.stopped or reason
        self._enough.set()

    def _ask(self, name: str, digest: str, jpeg: bytes) -> None:
        reserved = self._budget.reserve()
        if reserved is None:
            self._capped()
            return
        entry = {"sha256": digest, "name": name}
        answer: Answer | None = None
        cost = 0.0

        def lost(problem: str) -> None:
            self._journal.append({**entry, "kind": "lost", "text": problem, "tokens": None, "cost": reserved})
            with self._lock:
                self._report.counts["lost"] += 1
            if not self._budget.lose(reserved):
                raise _CapReached

        try:
            answer = self._client.ask(jpeg, lost)
        except RejectedError as error:
            self._rejected(name, str(error))
        except NoAnswerError as error:
            self._failed(name, str(error))
        except _CapReached:
            self._capped()
        finally:
            tokens = None if answer is None else answer.tokens
            cost = self._budget.settle(reserved, tokens, answered=answer is not None)
        if answer is not None:
            self._journal.append({**entry, "kind": answer.kind, "text": answer.text, "tokens": tokens, "cost": cost})
            self._answered(name, answer)

    def _capped(self) -> None:
        with self._lock:
            self._end(f"the price cap of {self._options.cap:g} ({self._budget.spent:.4g} is spent)")

    def _answered(self, name: str, answer: Answer) -> None:
        if answer.kind != "caption":
            self._note(answer.kind, name, answer.text)
        with self._lock:
            self._failed_in_a_row = 0
            self._report.counts["caption"] += answer.kind == "caption"
            for i, tokens in enumerate(answer.tokens or (0, 0)):
                self._report.tokens[i] += tokens

    def _note(self, reason: str, name: str, message: str) -> None:
        with self._lock:
            self._report.counts[reason] += 1
            if self._report.counts[reason] <= _EXAMPLES:
                self._report.notes.append((name, reason, message))

    def _rejected(self, name: str, message: str) -> None:
        self._note("rejected", name, message)
        answered = sum(self._report.counts[kind] for kind in ("caption", "refused", "empty", "cut"))
        if not answered and self._report.counts["rejected"] >= _REJECTED_AT_FIRST:
            raise EndpointError(f"The endpoint rejects every request; the last: {message}. Correct --model or --extra.")

    def _failed(self, name: str, message: str) -> None:
        self._note("failed", name, message)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _FAILED_IN_A_ROW:
            raise EndpointError(
                f"{self._failed_in_a_row} images in a row got no answer; the last: {message}. The answers so far are "
                "kept: run the command again when the endpoint works."
            )
