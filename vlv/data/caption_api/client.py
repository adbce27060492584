"""A client of the captioning API: asks one question about an image until it is answered or cannot be.

The API is OpenAI's chat completions, which hosted models and your own vLLM offer. An answer is a caption, or something
that must not become one: a refusal, nothing, or half a sentence.
"""

import base64
import email.utils
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from vlv.data.readers.found import readable
from vlv.io import files

# The default instruction. Stage 2 learns to write such captions: facts, in whole sentences, with an end.
PROMPT = (
    "Describe this image in one paragraph of 60 to 150 words. Name the objects and people, how many there are, "
    "their colours, what they do and where in the picture they are; then the background, any text that can be read, "
    "the light, and whether it is a photograph, a drawing or something else. Say only what can be seen. Begin "
    "with the description itself, without an introduction."
)

Kind = Literal["caption", "refused", "empty", "cut"]

# How chat models begin a refusal. A caption does not begin in the first person.
_REFUSAL = re.compile(
    r"\W*(?:(?:i['\u2019]?m|i am)\s+(?:\w+\s+)?(?:sorry|unable|not able|not allowed)|sorry\b|i\s+apologi[sz]e"
    r"|i\s+(?:can\s?not|can['\u2019]t|won['\u2019]t|will not|do not|don['\u2019]t|must decline)\b|as an ai\b"
    r"|unfortunately,?\s+i\b)",
    re.IGNORECASE,
)


class GarbageError(ValueError):
    """The answer is not a chat completion."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        kind: `caption`; `refused`: by the API's own field, by its content filter, or in words; `empty`; `cut`: at the
            token limit (half a sentence would teach the captioner to stop anywhere).
        text: the caption, with each run of white space replaced by one space, or what the model said instead.
        tokens: of the prompt and of the completion; None if the endpoint does not say.
    """

    kind: Kind
    text: str
    tokens: tuple[int, int] | None


def parse(body: bytes) -> Answer:
    """Read the body of a chat completion.

    Raises:
        GarbageError: the body is not JSON, or is not a chat completion.
    """
    try:
        value = files.parse_json(body, "the answer")
        choice = value["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise GarbageError(f"no chat completion: {body[:200]!r} ({type(error).__name__})") from error
    text = " ".join(readable(_text(content)).split())
    tokens = _tokens(value.get("usage"))
    if refusal:
        return Answer("refused", readable(str(refusal)), tokens)
    if choice.get("finish_reason") == "content_filter":
        return Answer("refused", text or "content filter", tokens)
    if not text:
        return Answer("empty", "", tokens)
    if _REFUSAL.match(text):
        return Answer("refused", text, tokens)
    return Answer("cut" if choice.get("finish_reason") == "length" else "caption", text, tokens)


def _text(content: Any) -> str:
    """The content as text. Some servers send it in parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if content is None or isinstance(content, str):
        return content or ""
    raise GarbageError(f"the message's content is {type(content).__name__}, not text")


def _tokens(usage: Any) -> tuple[int, int] | None:
    try:
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        return None


_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FATAL = {
    401: "the key is missing or wrong: name its environment variable with --key-env",
    402: "the account has no credit",
    403: "the key may not use this model",
    404: "there is no such address or model: check --base-url (it usually ends in /v1) and --model",
}
_MAX_ANSWER = 4 << 20  # bytes; a longer answer is not a caption


class EndpointError(RuntimeError):
    """The endpoint cannot be used at all. The message says why and what to do."""


class RejectedError(RuntimeError):
    """The endpoint does not accept this image."""


class NoAnswerError(RuntimeError):
    """All attempts for one image have failed."""


class StoppedError(RuntimeError):
    """The run is ending."""


@dataclass(frozen=True)
class Question:
    """What is asked, and of which model. Times are in seconds.

    Attributes:
        key: sent as a bearer token and never written to disk.
        max_tokens: the largest number of tokens in a caption.
        extra: merged into each request; None removes a field, such as {"max_tokens": None, "max_completion_tokens":
            400}.
        retries: further attempts for an image after the first.
        first_wait: the pause before the second attempt; the pauses double from there.
        longest_wait: if the endpoint asks for a longer pause, the run ends.
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


class Client:
    """Sends images to the API. Thread-safe, with one pool of connections for all threads.

    The retry policy: pauses double from `first_wait` up to a minute, each multiplied by a random number from 0.5 to 1,
    and are never shorter than a Retry-After header says. When the endpoint has told one thread to wait, no thread
    sends anything.
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
        self._not_before = 0.0  # time on the monotonic clock; for all threads

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def ask(self, jpeg: bytes, lost: Callable[[str], None]) -> Answer:
        """Ask about one image.

        Args:
            jpeg: the encoded image.
            lost: called for each request that may be billed although no answer came back.

        Raises:
            RejectedError, NoAnswerError: this image gets no answer.
            EndpointError: no image gets an answer.
            StoppedError: the run ended during a pause.
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
        """Pause before an attempt: until the endpoint accepts requests again, and longer after each failure."""
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
        """One request. httpx limits the time of each read; the time of the whole answer is limited here."""
        deadline = time.monotonic() + self._question.timeout
        body = bytearray()
        with self._client.stream("POST", self._url, json=self._request(jpeg)) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _MAX_ANSWER or time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the answer did not end after {len(body)} bytes", request=response.request)
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
        """What is wrong with a failed request, if another attempt may help; otherwise raises."""
        status, said = response.status_code, body[:300].decode("utf-8", "replace")
        problem = f"HTTP {status}: {said}"
        if status in _FATAL or response.is_redirect or "insufficient_quota" in said:
            remedy = _FATAL.get(status, "the address redirects" if response.is_redirect else "no quota is left")
            raise EndpointError(f"{self._url} answers {problem} - {remedy}")
        if status not in _RETRIED:
            raise RejectedError(problem)
        pause = _retry_after(response.headers.get("retry-after", ""))
        if pause > self._question.longest_wait:
            raise EndpointError(f"{self._url} asks to wait {pause:.0f} s ({problem}). Run the command again then.")
        if pause:
            self._not_before = max(self._not_before, time.monotonic() + pause)
        return problem


def _retry_after(value: str) -> float:
    """The seconds of a Retry-After header, which is a number or a date; 0 without one."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
