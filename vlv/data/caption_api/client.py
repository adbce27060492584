"""One question to an OpenAI-compatible chat-completions endpoint, asked until it is answered or cannot be."""

import base64
import email.utils
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from vlv.data.caption_api.answer import Answer, GarbageError, parse

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = {
    401: "the key is missing or wrong: name its environment variable with --key-env",
    402: "the account has no credit",
    403: "the key may not use this model",
    404: "there is no such address or model: check --base-url (it usually ends in /v1) and --model",
}
_MAX_ANSWER = 4 << 20  # bytes; more is no caption


class EndpointError(RuntimeError):
    """The endpoint cannot be used at all; the message says why and what to do."""


class RejectedError(RuntimeError):
    """The endpoint will not take this image."""


class NoAnswerError(RuntimeError):
    """All attempts for one image have failed."""


class StoppedError(RuntimeError):
    """The run is ending."""


@dataclass(frozen=True)
class Question:
    """What is asked, of whom. Times in seconds.

    `key` is sent as a bearer token and written nowhere. `extra` is merged into each request; a null removes a
    field (such as {"max_tokens": null, "max_completion_tokens": 400}). A wait longer than `longest_wait`, asked for
    by the endpoint, ends the run.
    """

    base_url: str
    model: str
    prompt: str
    key: str | None = field(default=None, repr=False)
    max_tokens: int = 400
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 300.0


class Endpoint:
    """Sends images; thread-safe, with one pool of connections for all threads.

    Waits between attempts double from `first_wait` to a minute, times a random 0.5 to 1, and are never shorter than
    a Retry-After; while one thread has been told to wait, no other sends anything.
    """

    def __init__(self, question: Question, stop: threading.Event, connections: int) -> None:
        self._question, self._stop = question, stop
        self._url = question.base_url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {question.key}"} if question.key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(question.timeout, connect=min(question.timeout, 15.0)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )
        self._not_before = 0.0  # on the monotonic clock, for all threads

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def ask(self, jpeg: bytes, lost: Callable[[str], None]) -> Answer:
        """The answer for one image; `lost` is told of each request that may be billed though nothing came back.

        Raises:
            RejectedError, NoAnswerError: for this image.
            EndpointError: for all.
            StoppedError: while waiting.
        """
        problem = ""
        for attempt in range(self._question.retries + 1):
            self._wait(attempt)
            try:
                response, body = self._send(jpeg)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                problem = f"no connection: {error}"
                continue
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise EndpointError(f"{self._url}: {error}. It must begin with http:// or https://") from error
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                lost(problem)
                continue
            if response.is_success:
                try:
                    return parse(body)
                except GarbageError as error:
                    problem = str(error)
                    lost(problem)
                    continue
            problem = self._examine(response, body)
        raise NoAnswerError(f"{self._question.retries + 1} attempts failed; the last: {problem}")

    def _wait(self, attempt: int) -> None:
        """Before an attempt: until the endpoint is ready for anyone, and longer after each failure."""
        pause = 0.0
        if attempt:
            pause = min(60.0, self._question.first_wait * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        until = time.monotonic() + pause
        while True:
            left = max(until, self._not_before) - time.monotonic()
            if self._stop.wait(max(0.0, left)):
                raise StoppedError
            if left <= 0:
                return

    def _send(self, jpeg: bytes) -> tuple[httpx.Response, bytes]:
        """One request. httpx bounds each read; a server that trickles is bounded here as a whole."""
        deadline = time.monotonic() + self._question.timeout
        body = bytearray()
        with self._client.stream("POST", self._url, json=self._request(jpeg)) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _MAX_ANSWER or time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no end after {len(body)} bytes", request=response.request)
        return response, bytes(body)

    def _request(self, jpeg: bytes) -> dict[str, Any]:
        data = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content = [
            {"type": "text", "text": self._question.prompt},
            {"type": "image_url", "image_url": {"url": data}},
        ]
        request = {
            "model": self._question.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._question.max_tokens,
        }
        request |= self._question.extra
        return {name: value for name, value in request.items() if value is not None}

    def _examine(self, response: httpx.Response, body: bytes) -> str:
        """What is wrong with an answer that is no success; returns if it is worth another attempt."""
        status, said = response.status_code, body[:300].decode("utf-8", "replace")
        problem = f"HTTP {status}: {said}"
        if status in _HOPELESS or response.is_redirect or "insufficient_quota" in said:
            remedy = _HOPELESS.get(status, "the address redirects" if response.is_redirect else "no quota is left")
            raise EndpointError(f"{self._url} answers {problem} - {remedy}")
        if status not in _AGAIN:
            raise RejectedError(problem)
        pause = _retry_after(response.headers.get("retry-after", ""))
        if pause > self._question.longest_wait:
            raise EndpointError(f"{self._url} asks to wait {pause:.0f} s ({problem}). Run the command again then.")
        if pause:
            self._not_before = max(self._not_before, time.monotonic() + pause)
        return problem


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 without one."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
