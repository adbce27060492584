"""Damage that happens to files: a full disk, a power cut, a flipped bit, an edit by hand."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

DEEP = 50_000

Mutation = Callable[[bytes, random.Random], bytes | None]


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def _overwrite(data: bytes, draw: random.Random, value: bytes | None) -> bytes:
    length = min(len(data), draw.choice([1, 16, 512]))
    at = draw.randrange(len(data) - length + 1)
    return data[:at] + (draw.randbytes(length) if value is None else value * length) + data[at + length :]


# Name -> the new content; None: a folder in its place.
MUTATIONS: dict[str, Mutation] = {
    "emptied": lambda data, draw: b"",
    "cut short": lambda data, draw: data[: draw.randrange(len(data))],
    "last bytes lost": lambda data, draw: data[: -draw.randint(1, min(20, len(data)))],
    "a bit flipped": _flip,
    "zeros inside": lambda data, draw: _overwrite(data, draw, b"\0"),
    "noise inside": lambda data, draw: _overwrite(data, draw, None),
    "noise": lambda data, draw: draw.randbytes(max(16, min(len(data), 4096))),
    "twice": lambda data, draw: data + data,
    "a list": lambda data, draw: b"[1, 2]\n",
    "null": lambda data, draw: b"null\n",
    "an empty object": lambda data, draw: b"{}\n",
    "nested deeply": lambda data, draw: b"[" * DEEP,
    "objects nested deeply": lambda data, draw: b'{"a":' * DEEP,
    "not text": lambda data, draw: b"\xff\xfe\x00\xd8" + data,
    "a folder": lambda data, draw: None,
}


def mutate(path: Path, name: str, draw: random.Random) -> None:
    """Apply it to a file. A mutation that needs a byte leaves an empty file as it is."""
    data = path.read_bytes() or b"\n"
    new = MUTATIONS[name](data, draw)
    path.unlink()
    if new is None:
        path.mkdir()
        (path / "inside").write_bytes(data[:100])
    else:
        path.write_bytes(new)


def restore(project: Path, whole: Path) -> None:
    """Put `project` back to the state of `whole`."""
    shutil.rmtree(project)
    shutil.copytree(whole, project, symlinks=True)
