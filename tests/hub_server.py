"""The part of the Hugging Face hub's HTTP interface that a download asks for, with files from `folder`/OWNER/NAME."""

import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vlv.io import files


class _Hub(BaseHTTPRequestHandler):
    folder: Path
    served: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = [part for part in urllib.parse.urlsplit(self.path).path.split("/") if part]
        if parts[0] == "api":
            repository, rest = self.folder.joinpath(*parts[2:4]), parts[4:]
        else:
            repository, rest = self.folder.joinpath(*parts[:2]), parts[2:]
        headers = {"X-Repo-Commit": self.commit}
        if not repository.is_dir():
            return self._send(404, b"{}", headers | {"X-Error-Code": "RepoNotFound"}, body)
        if rest[0] == "resolve":
            file = repository.joinpath(*rest[2:])
            content = file.read_bytes()
            if body:
                self.served.append(file.relative_to(repository).as_posix())
            return self._send(200, content, headers | {"ETag": f'"{files.sha256_bytes(content)}"'}, body)
        listed = [path for path in sorted(repository.rglob("*")) if path.is_file()]
        tree = [
            {"type": "file", "path": path.relative_to(repository).as_posix(), "size": path.stat().st_size, "oid": "0"}
            for path in listed
        ]
        answer: object = tree if rest[0] == "tree" else {"id": "/".join(parts[2:4]), "sha": self.commit, "siblings": []}
        return self._send(200, json.dumps(answer).encode(), headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the address and the names of the files that were downloaded, in their order."""
    served: list[str] = []
    handler = type("_HubOf", (_Hub,), {"folder": folder, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
