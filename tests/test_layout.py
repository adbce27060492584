"""A newcomer can find things in the tree: each file name occurs once, and files and functions are short."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_MOST_LINES = 320
_LONGEST_FUNCTION = 60
# The training loop is read from top to bottom.
_LONG_BY_DESIGN = {("loop.py", "train")}
_QUESTIONS = 10
_PLACE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+|\w+\.yaml)(?::(\w+))?`")


def _sources() -> list[Path]:
    return sorted(path for folder in ("vlv", "flows") for path in (ROOT / folder).rglob("*.py"))


def test_each_file_name_occurs_once() -> None:
    counts = Counter(path.name for path in _sources() if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _sources()}
    assert {str(path): count for path, count in lines.items() if count > _MOST_LINES} == {}


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function; the signature and the docstring of a command are its help text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first.lineno + 1


def test_functions_are_short_except_the_training_loop() -> None:
    long = [
        f"{path}: {name} has {lines} lines"
        for path in _sources()
        for name, lines in _functions(path)
        if lines > _LONGEST_FUNCTION and (path.name, name) not in _LONG_BY_DESIGN
    ]
    assert long == []


def _rows() -> list[list[str]]:
    """The cells of the table in CONTRIBUTING that says where to change what."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Where to change what")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]  # without the head and the line below it


def _places(cell: str) -> list[tuple[str, str]]:
    """(path, symbol or "") for each `path` or `path:symbol` of a cell."""
    return _PLACE.findall(cell)


def test_the_table_of_changes_names_files_and_definitions_that_exist() -> None:
    rows = _rows()
    assert len(rows) >= _QUESTIONS
    for question, answer in rows:
        places = _places(answer)
        assert 1 <= len({path for path, _ in places}) <= 2, f"{question}: one file, or two at most"
        for path, symbol in places:
            assert (ROOT / path).exists(), f"{question}: there is no {path}"
            text = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
            assert re.search(rf"\b{re.escape(symbol)}\b", text) or not symbol, f"{question}: {path} has no {symbol}"


@pytest.mark.parametrize("cell", ["`vlv/nowhere.py`", "`vlv/config/__init__.py:no_such_name`"])
def test_the_rule_above_can_fail(cell: str) -> None:
    ((path, symbol),) = _places(cell)
    assert not (ROOT / path).exists() or not re.search(rf"\b{symbol}\b", (ROOT / path).read_text(encoding="utf-8"))
