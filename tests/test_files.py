"""Reading and appending: any file gives its content, or one line that names the file."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlv import config
from vlv.io import files, json_lines
from vlv.io.files import FileError

DEEP = 100_000


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00profile")
    for name, reason in (("missing", "No such file"), ("folder", "Is a directory"), ("binary", "not UTF-8")):
        for read in (files.read_text, files.read_json, files.read_json_object, files.read_yaml):
            with pytest.raises(FileError, match=rf"{name}.*{reason}.*Fetch it\."):
                read(tmp_path / name, "Fetch it.")


@pytest.mark.parametrize(
    "content", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "", "{", "1" * 5000, '{"a": 1']
)
def test_invalid_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "value.json"
    path.write_text(content)
    with pytest.raises(FileError, match=r"value\.json.*(valid JSON|too deeply)"):
        files.read_json(path)


@pytest.mark.parametrize("content", ["[]", "null", "1", '"text"'])
def test_json_must_be_an_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "value.json"
    path.write_text(content)
    assert files.read_json(path) == json.loads(content)
    for read in (files.read_json_object, files.read_yaml_mapping):
        with pytest.raises(FileError, match=r"value\.json holds no"):
            read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "'c' is given twice"),
        ("a: 1\nb: 2\n'a': 3\n", "'a' is given twice"),
        ("[" * DEEP, "too deeply"),
        ("a: [1", "valid YAML"),
        ("a: 2024-99-99", "valid YAML"),
        ("? [1, 2]\n: {}\n? {a: 1}\n: 3", "valid YAML"),
        ("!!python/object/apply:os.system ['true']", "valid YAML"),
        ("a: " + "x" * (1 << 20), "are read as YAML"),
    ],
)
def test_yaml_is_read_safely(content: str, reason: str) -> None:
    with pytest.raises(FileError, match=rf"(?s)it\.yaml.*{reason}"):
        files.parse_yaml(content, "it.yaml")


def test_merged_keys_are_not_given_twice() -> None:
    text = "base: &base {a: 1, b: 2}\nown: &own\n  <<: *base\n  a: 3\nthird:\n  <<: *own\n  b: 4\n"
    assert files.parse_yaml(text, "it.yaml")["third"] == {"a": 3, "b": 4}


def test_a_configuration_with_a_key_given_twice_is_refused() -> None:
    text = (Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    with pytest.raises(config.ConfigError, match=r"tiny\.yaml.*'profile' is given twice"):
        config.parse(text + "profile: other\n", "tiny.yaml")


def test_a_partial_last_line_is_removed_before_the_next_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for torn in (b"", b'{"step": 2, "lo', b"\xff", b"x" * 200_000):
        path.write_bytes(b'{"step": 1}\n' + torn)
        assert json_lines.read(path) == [{"step": 1}]
        json_lines.append(path, {"step": 2})
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"the first was torn')
    json_lines.append(path, {"step": 1})
    assert json_lines.read(path) == [{"step": 1}]


def test_damaged_lines_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "lo{"step": 3}',
        b"[4]",
        b"\xff\xfe",
        b"[" * DEEP,
        b"",
        b'{"stop": 5}',
        b'{"step": 6}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert json_lines.read(path, lambda row: "step" in row) == [{"step": 1}, {"step": 6}]
    assert "lines.jsonl: 5 damaged lines" in caplog.text


def test_a_lone_surrogate_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A file name that is not UTF-8 is a str with a lone surrogate; it must be written, and read unchanged."""
    name = os.fsdecode(b"caf\xe9.jpg")
    json_lines.append(tmp_path / "lines.jsonl", {"image": name})
    files.write_json(tmp_path / "value.json", {name: "é"})
    assert json_lines.read(tmp_path / "lines.jsonl") == [{"image": name}]
    assert files.read_json(tmp_path / "value.json") == {name: "é"}


_APPEND = """
import sys
from pathlib import Path
from vlv.io import json_lines
for number in range(200):
    json_lines.append(Path(sys.argv[1]), {"who": sys.argv[2], "number": number})
"""


def test_processes_append_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    commands = [[sys.executable, "-c", _APPEND, str(path), str(who)] for who in range(3)]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait(60) == 0
    rows = json_lines.read(path)
    assert sorted((row["who"], row["number"]) for row in rows) == [(str(w), n) for w in range(3) for n in range(200)]


def test_a_file_set_aside_keeps_its_content_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.json"
    for content in ("first", "second"):
        path.write_text(content)
        with caplog.at_level(logging.WARNING):
            files.set_aside(path, FileError(f"{path} is not valid JSON."), "it begins anew")
        assert not path.exists() and (tmp_path / "run.json.damaged").read_text() == content
    assert "run.json is not valid JSON. It is kept as run.json.damaged; it begins anew" in caplog.text
