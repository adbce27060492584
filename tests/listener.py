"""A proxy that forwards nothing and records every connection that a command tries to open.

requests, httpx, urllib, aiohttp with `trust_env`, pip and git all go through the proxy that the environment names.
"""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.calls: list[str] = []


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        first = self.rfile.readline(65536).decode("latin-1").strip()
        assert isinstance(self.server, _Server)
        self.server.calls.append(first)
        self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


class Listener:
    """`environment`: what sends a child's connections here; `calls`: the first line of each: CONNECT HOST:443."""

    def __init__(self, server: _Server) -> None:
        self.calls = server.calls
        address = f"http://127.0.0.1:{server.server_address[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        self.environment = {name: address for lower in names for name in (lower, lower.upper())}
        self.environment |= {"no_proxy": "127.0.0.1,localhost,0.0.0.0", "NO_PROXY": "127.0.0.1,localhost,0.0.0.0"}


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener for the `with` block."""
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Listener(server)
        finally:
            server.shutdown()
