"""Write the reference pages that come from the code: `python -m docs.generate`.

docs/reference/cli.md lists every command of `vlv` with its options, from the typer application.
docs/reference/configuration.md lists every key of params.yaml, from the descriptions in vlv/config/.
Both are committed, so that they can be read without a build and a change of a command shows in a diff;
tests/test_docs.py compares them with what this module writes.
"""

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from vlv.cli.main import app
from vlv.config import Config
from vlv.io import files

REFERENCE = Path(__file__).resolve().parent / "reference"
_WORDS = {Path: "path", str: "text", int: "integer", float: "number"}
_WRITTEN = "<!-- Written by `python -m docs.generate`. Do not edit. -->"


def pages() -> dict[str, str]:
    """File name in docs/reference -> its text."""
    return {"cli.md": _cli(), "configuration.md": _configuration()}


def _cli() -> str:
    root = typer.main.get_command(app)
    lines = [
        _WRITTEN,
        "# Command line",
        "",
        "`vlv --help` and `vlv COMMAND --help` print the same. Commands work in the folder that holds `params.yaml`",
        "and in every folder below it; `VLV_ROOT` names another project.",
        "",
        "Exit codes: 0: done; 1: a check found a problem; 2: an error that names its cause and what to do;",
        "3: `vlv promote` refused a version; 4 and 5: some or all images failed (`vlv caption`, `vlv reconstruct`);",
        "143: stopped by SIGTERM after saving.",
    ]
    for name, command in _commands(root, "vlv"):
        lines += ["", f"## `{name}`", "", _prose(command.help or ""), *_parameters(command)]
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below `command`, with the words that a user types."""
    for word, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, f"{name} {word}")
        else:
            yield f"{name} {word}", inner


def _prose(text: str) -> str:
    """A docstring without rich's markup; what it prints dimly is an example or a pointer."""
    text = re.sub(r"\[dim\](.*?)\[/(?:dim)?\]", _example, text, flags=re.DOTALL)
    return re.sub(r"\[/?(?:bold|red|green|yellow)?\]", "", text).strip()


def _example(found: re.Match[str]) -> str:
    text = " ".join(found[1].split())
    return f"`{text}`" if text.startswith("vlv ") else text


def _parameters(command: Any) -> list[str]:
    shown = [one for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
    if not shown:
        return []
    rows = [f"| {_name(one)} | {_kind(one)} | {_default(one)} | {_cell(_prose(one.help or ''))} |" for one in shown]
    return ["", "| argument or option | value | default | |", "|---|---|---|---|", *rows]


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or str(parameter.name).upper()}`"
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{one}`" for one in names)


def _kind(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    if getattr(parameter, "is_flag", False):
        return "flag"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(kind))
    limits = [f"{sign} {value}" for sign, value in (("≥", parameter.min), ("≤", parameter.max)) if value is not None]
    return " ".join([_WORDS.get(kind, "text"), *limits, *(["(may be repeated)"] if parameter.multiple else [])])


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value in ((), []) or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def _configuration() -> str:
    schema = Config.model_json_schema(by_alias=True)
    lines = [
        _WRITTEN,
        "# Configuration",
        "",
        "Every key of `params.yaml`. Each profile in `configs/` is a whole `params.yaml`: `vlv config use NAME` copies",
        "one there. `vlv config show` prints the active configuration with its defaults. An unknown key, a wrong type",
        "and a value outside its range are errors that name the key. The classes are in `vlv/config/`.",
    ]
    todo: list[tuple[str, dict[str, Any]]] = [("", schema)]
    while todo:
        path, section = todo.pop(0)
        rows, below = [], []
        for key, field in section["properties"].items():
            dotted = f"{path}.{key}" if path else key
            nested = [one for name in _references(field) if "properties" in (one := _definition(schema, name))]
            below += [(dotted, one) for one in nested]
            if not nested or "description" in field:
                rows.append(_row(dotted, field, key in section.get("required", ()), schema))
        kind = section["properties"].get("kind", {}).get("const")
        title = f"## `{path}`" if path else "## The whole file"
        lines += ["", title + (f", kind `{kind}`" if kind else ""), "", _first_paragraph(section)]
        lines += ["", "| key | values | default | |", "|---|---|---|---|", *rows] if rows else []
        todo = below + todo
    return "\n".join(lines).rstrip() + "\n"


def _row(key: str, field: dict[str, Any], needed: bool, schema: dict[str, Any]) -> str:
    text = _cell(field.get("description", ""))
    return f"| `{key}` | {_values(field, schema)} | {_filled_in(field, needed)} | {text} |"


def _references(field: dict[str, Any]) -> list[str]:
    """Names of the sections that a field may hold."""
    options = [field, *field.get("anyOf", ()), *field.get("oneOf", ())]
    return [one["$ref"].rpartition("/")[2] for one in options if "$ref" in one]


def _definition(schema: dict[str, Any], name: str) -> dict[str, Any]:
    value: dict[str, Any] = schema["$defs"][name]
    return value


def _first_paragraph(section: dict[str, Any]) -> str:
    return " ".join(str(section.get("description", "")).split("\n\n")[0].split())


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "$ref" in field:
        inner = _definition(schema, _references(field)[0])
        return "a section" if "properties" in inner else _values(inner, schema)
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(_values(one, schema) for one in options))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if field.get("type") == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_values(items, schema)}"
    if field.get("type") == "object":
        return f"name: {_values(field.get('additionalProperties') or {}, schema)}"
    names = {"string": "text", "boolean": "true, false", "null": "null", "number": "number", "integer": "integer"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return " ".join([names.get(str(field.get("type")), "any"), *limits])


def _filled_in(field: dict[str, Any], needed: bool) -> str:
    if needed or "default" not in field:
        return "required" if needed else ""
    value = field["default"]
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`"


def _cell(text: str) -> str:
    """Text for one cell of a table: `|` and `<` would mean something else there."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        files.write_text(REFERENCE / name, text)
        print(f"docs/reference/{name}")


if __name__ == "__main__":
    main()
