"""Malicious inputs, through every command that reads one."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import trials
from tests.campaign.trials import Tally

DEEP = 50_000
DEEP_JSON = "[" * DEEP
SURROGATE = '{"caption": "half a character: \\ud800"}'


class _Runs:
    """It leaves a mark if it is unpickled. It is only written here; the trials check that no command loads it."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self._mark, "w")


def run(project: Path, draw: random.Random, rounds: int, only: set[str] | None = None) -> Iterator[Tally]:
    """Every command with each of its hostile inputs, `rounds` random ones of each kind besides.

    `only`: the kinds to run; without: all of them.
    """
    scratch = project / "hostile"
    scratch.mkdir()
    mark = project / "somebody-ran-me"
    picture, output = str(project / "picture.png"), ["-o", str(scratch / "out")]
    for name, arguments, inputs in (
        ("configuration", lambda path: ["plan", "--config", str(path), "--gpu", "H100", "--count", "1"], _yaml),
        ("profile", lambda path: ["config", "use", path.stem], _yaml),
        ("launch file", lambda path: ["run", "stage1"], _yaml),
        ("pictures", lambda path: ["caption", str(path), *output], _pictures),
        ("saved model", lambda path: ["caption", picture, *output, "--model", str(path)], _models),
        ("import", lambda path: ["data", "import", str(path)], _sources),
        ("GGUF", lambda path: ["convert", "gguf", str(path), *output], _ggufs),
        ("Florence-2", lambda path: ["convert", "florence", str(path), *output], _checkpoints),
        ("stage 1 checkpoint", lambda path: ["convert", "vlv-stage1", str(path), *output], _checkpoints),
        ("stage 2 checkpoint", lambda path: ["convert", "vlv-stage2", str(path), *output], _checkpoints),
    ):  # fmt: skip
        if only is not None and name not in only:
            continue
        tally = Tally(f"hostile input: {name}")
        for number, (what, content) in enumerate([*inputs(mark, draw), *_noise(draw, rounds)]):
            path = _place(project, scratch, name, number, content)
            outcome = trials.vlv(arguments(path), project)
            tally.judge(what, outcome, "it ran what it was given" if mark.exists() else None)
            mark.unlink(missing_ok=True)
        yield tally


Content = bytes | dict[str, bytes | None]  # a file, or a folder of files; None: a named pipe


def _place(project: Path, scratch: Path, name: str, number: int, content: Content) -> Path:
    path = scratch / f"{name.replace(' ', '-')}-{number}"
    if name in ("profile", "launch file"):
        assert isinstance(content, bytes)
        path = project / "configs" / f"hostile-{number}.yaml"
        path.write_bytes(content)
        if name == "launch file":
            params = project / "params.yaml"
            text = (project / "configs" / "smoke.yaml").read_text(encoding="utf-8")
            params.write_text(f"{text}\ncompute: {{launch: {path.relative_to(project)}}}\n", encoding="utf-8")
        return path
    if name == "GGUF":
        path = path.with_suffix(".gguf")
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    for inside, data in content.items():
        file = path / inside
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            os.mkfifo(file)
        else:
            file.write_bytes(data)
    return path


def _noise(draw: random.Random, rounds: int) -> Iterator[tuple[str, Content]]:
    for _ in range(rounds):
        yield "noise", draw.randbytes(draw.choice([1, 100, 10_000]))


def _yaml(mark: Path, _draw: random.Random) -> Iterator[tuple[str, Content]]:
    yield "empty", b""
    yield "not text", b"\xff\xfe\x00a: 1"
    yield "a key twice", b"profile: smoke\nprofile: smoke\n"
    yield "nested lists", DEEP_JSON.encode()
    yield "nested mappings", b"{a: " * DEEP
    yield "a tag that runs", f"!!python/object/apply:builtins.open ['{mark}', 'w']".encode()
    yield (
        "ten million words",
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n".encode() for i in range(7)),
    )
    yield "a date that is none", b"profile: 2024-99-99\n"
    yield "a list", b"[1, 2]"
    yield "a number of processes without end", b"num_processes: 1000000000000000000000\ndistributed_type: [1]\n"
    yield "2 MiB", b"a: '" + b"x" * (2 << 20) + b"'"


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _pictures(mark: Path, draw: random.Random) -> Iterator[tuple[str, Content]]:
    good = _png(8, 8, (b"\0" + b"\x80" * 24) * 8)
    bad = {
        "empty.jpg": b"", "cut.png": good[:40], "bomb.png": _png(60_000, 60_000, b"\0" * 1000),
        "wide.png": _png(100_000, 1, b"\0" + b"\x80" * 300_000), "text.jpg": b"no picture",
        "program.jpg": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({mark}) (w) file\n".encode(),
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>",
        "header.tif": b"II*\0" + b"\xff" * 60, "header.gif": b"GIF89a" + b"\xff" * 60,
        "texture.jpg": b"DDS " + struct.pack("<I", 124) + b"\xff" * 120, "blp.png": b"BLP2" + b"\1" * 200,
        "header.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 " + b"\xff" * 60,
    }  # fmt: skip
    for name, content in bad.items():
        yield f"{name} beside a good one", {name: content, "good.png": good}
    yield "a pipe called a picture", {"pipe.png": None, "good.png": good}
    yield "a name that is not UTF-8", {os.fsdecode(b"caf\xe9.png"): good}
    yield "a folder called a picture", {"folder.png/good.png": good}
    for _ in range(3):
        at = draw.randrange(8, len(good))
        yield "noise in a picture", {"noise.png": good[:at] + draw.randbytes(8) + good[at + 8 :]}


def _models(mark: Path, _draw: random.Random) -> Iterator[tuple[str, Content]]:
    weights = {"model.safetensors": b"\xff" * 100}
    for what, text in {
        "no JSON": "{", "nested": DEEP_JSON, "a list": "[]", "null": "null", "other": '{"format": "other"}',
        "no configuration": '{"format": "vlv-captioner-1"}',
        "no parts": '{"format": "vlv-captioner-1", "config": {}, "parts": []}',
        "a number": "1" * 5000,
    }.items():  # fmt: skip
        yield f"config.json: {what}", {"config.json": text.encode(), **weights}
    yield "config.json: a folder", {"config.json/inside": b"", **weights}
    yield "no folder", b"text"
    yield "pickled weights", {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(_Runs(mark))}


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _sources(_mark: Path, _draw: random.Random) -> Iterator[tuple[str, Content]]:
    good = _png(8, 8, (b"\0" + b"\x80" * 24) * 8)
    for what, text in {
        "half a character": SURROGATE, "nested": DEEP_JSON, "infinite": '{"caption": "a", "score": Infinity}',
        "a list": "[1]", "a number": "1" * 5000, "no text": "\0\0",
    }.items():  # fmt: skip
        yield f"JSON beside a picture: {what}", {"a.png": good, "a.json": text.encode(), "b.png": good, "b.txt": b"b"}
        yield f"JSON in a tar: {what}", {"0.tar": _tar({"a.png": good, "a.json": text.encode()})}
        yield f"annotations: {what}", text.encode()
    yield "a caption that is not text", {"a.png": good, "a.txt": b"\xff\xfe\0\xd8"}
    yield "a caption that is a folder", {"a.png": good, "a.txt/x": b""}
    yield "a tar that leaves its folder", {"0.tar": _tar({"../../a.png": good, "../../a.txt": b"x"})}
    yield "a tar cut short", {"0.tar": _tar({"a.png": good, "a.txt": b"x"})[:700]}
    huge = bytearray(_tar({"a.png": good}))
    huge[124:136] = b"\x80" + b"\xff" * 11
    yield "a tar header of 2**87 bytes", {"0.tar": bytes(huge)}
    yield "a compressed tar", {"0.tar": gzip.compress(_tar({"a.png": good}))}
    yield "parquet of noise", {"a.parquet": b"PAR1" + b"\xff" * 200 + b"PAR1"}
    yield "a pipe called a picture", {"pipe.png": None, "a.png": good, "a.txt": b"a"}
    yield "lists in annotations", json.dumps({"images": [[1]], "annotations": {"a": 1}}).encode()


def _ggufs(_mark: Path, _draw: random.Random) -> Iterator[tuple[str, Content]]:
    def header(pairs: int, tensors: int, rest: bytes = b"") -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    kind = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    yield "200 bytes without sizes", header(1, 0, kind).ljust(200, b"\0")
    yield "2**60 values", header(1 << 60, 0)
    yield "2**60 tensors", header(1, 1 << 60, kind)
    yield "a text of 2**63 bytes", header(1, 0, struct.pack("<Q", 1 << 63))
    yield "an array of 2**60", header(1, 0, text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60))
    yield "an array of 2**60 texts", header(1, 0, text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60))
    yield "empty", b""
    yield "no GGUF", b"PK\3\4" * 50


def _checkpoints(mark: Path, _draw: random.Random) -> Iterator[tuple[str, Content]]:
    index = "model.safetensors.index.json"
    for what, text in {
        "a list": "[1]", "nested": DEEP_JSON, "no map": "{}", "a map of numbers": '{"weight_map": {"a": 1}}',
        "another folder": '{"weight_map": {"a": "../../../etc/passwd"}}', "nothing there": '{"weight_map": {"a": "b"}}',
    }.items():  # fmt: skip
        yield f"index: {what}", {index: text.encode()}
    yield "a pickle that runs", {"pytorch_model.bin": pickle.dumps(_Runs(mark)), "config.json": b"{}"}
    yield "safetensors of 2**62 bytes", {"model.safetensors": struct.pack("<Q", 1 << 62) + b"{}", "config.json": b"{}"}
    yield "safetensors cut short", {"model.safetensors": struct.pack("<Q", 50) + b'{"a":', "config.json": b"{}"}
    yield "config.json: nested", {"config.json": DEEP_JSON.encode(), "model.safetensors": b""}
    yield "config.json: a list", {"config.json": b"[]", "model.safetensors": b""}
    auto = {"model_type": "florence2", "vision_config": {"dim_embed": [1]}, "auto_map": {"AutoConfig": "evil.C"}}
    code = f"open({str(mark)!r}, 'w')\n".encode()
    yield "code of its own", {"config.json": json.dumps(auto).encode(), "evil.py": code, "model.safetensors": b""}
