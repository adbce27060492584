"""A chat-completions server on a real port that misbehaves as told, image by image."""

import base64
import io
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

TOKENS = (1000, 100)  # of each answer


def write_images(folder: Path, count: int) -> Path:
    """Images that the server can tell apart: the red of number i is 10 * i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40, 40), (10 * i, 120, 60)).save(folder / f"{i:02d}.png")
    return folder


def caption(number: int) -> str:
    return f"A plain field, number {number} of its kind."


def completion(content: Any, *, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": TOKENS[0], "completion_tokens": TOKENS[1], "total_tokens": sum(TOKENS)}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}], "usage": usage}


class ModelServer(ThreadingHTTPServer):
    """`script`: behaviours of an image's first requests (see `_Handler`); afterwards it is answered.

    `asked` and `answered` list image numbers as they came, `times` when each request came. All requests after the
    first `hold_after` wait until `release` is set; each answer takes `pause` seconds.
    """

    daemon_threads = True

    def __init__(self, script: dict[int, list[str]] | None = None, hold_after: int | None = None, pause: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = defaultdict(list, {number: list(what) for number, what in (script or {}).items()})
        self.hold_after, self.pause, self.release = hold_after, pause, threading.Event()
        self.asked: list[int] = []
        self.answered: list[int] = []
        self.times: list[tuple[float, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> "ModelServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = _number(request)
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            held = server.hold_after is not None and len(server.asked) >= server.hold_after
            server.asked.append(number)
            server.requests.append(request)
            server.keys.add(self.headers.get("Authorization"))
            what = server.script[number].pop(0) if server.script[number] else "answer"
            server.times.append((time.monotonic(), what))
        try:
            if held:
                server.release.wait(60)
            self._behave(what, number)
        finally:
            with server.lock:
                server.at_once -= 1

    def _behave(self, what: str, number: int) -> None:
        server = self.server
        time.sleep(server.pause)
        if what == "hang":
            server.release.wait(60)
        elif what == "cut":
            self._send(200, json.dumps(completion("never whole")).encode(), claim=4000)
            self.close_connection = True
        elif what == "trickle":
            self._send(200, b"", claim=10_000)
            while not server.release.wait(0.1):
                self.wfile.write(b" ")
        elif what == "garbage":
            self._send(200, b"<html>Welcome to the captive portal</html>")
        elif what == "odd":
            self._send(200, json.dumps({"choices": []}).encode())
        elif what.startswith("429"):
            self._send(429, b'{"error": "slow down"}', {"Retry-After": what.partition(":")[2]})
        elif what.isdigit():
            self._send(int(what), json.dumps({"error": {"message": f"trouble {what}"}}).encode())
        else:
            self._send(200, json.dumps(_answer(what, number)).encode())
            with server.lock:
                server.answered.append(number)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, claim: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if claim is None else claim))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def _number(request: dict[str, Any]) -> int:
    url = request["messages"][0]["content"][1]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        pixel = image.convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return round(pixel[0] / 10)


def _answer(what: str, number: int) -> dict[str, Any]:
    answers = {
        "refusal": completion(None, refusal="This cannot be shown."),
        "words": completion("I'm sorry, but I can't help with describing this image."),
        "filter": completion("A", finish="content_filter"),
        "empty": completion(" \n "),
        "null": completion(None),
        "length": completion("A plain field that goes on and", finish="length"),
        "parts": completion([{"type": "text", "text": caption(number)}]),
    }
    return answers.get(what, completion(f" {caption(number)}\n"))
