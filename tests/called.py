"""Run all stages in one process and write down which functions of the package each of them really called.

python tests/called.py OUTPUT     # {"stage1": ["vlv.io.images:decode", ...], ...}
"""

import ast
import sys
from pathlib import Path

import coverage

from vlv import stages
from vlv.config import Paths
from vlv.io import files

_PACKAGE = Path(stages.__file__).parents[1]


def _bodies(path: Path) -> dict[str, set[int]]:
    """Functions and methods of a module -> the lines of their bodies. Those that importing calls are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, set[int]] = {}
    called_by_import: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _lines(node)
        elif isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            found |= {f"{node.name}.{one.name}": _lines(one) for one in methods}
        else:
            called_by_import |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return {name: lines for name, lines in found.items() if name not in called_by_import}


def _lines(function: ast.FunctionDef) -> set[int]:
    return {line for node in function.body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def main(output: Path) -> None:
    """Run the stages of the project in the working directory, in their order."""
    measured = coverage.Coverage(data_file=None, source=[str(_PACKAGE)], branch=False, config_file=False)
    measured.start()
    for stage in stages.NAMES:
        measured.switch_context(stage)
        stages.run(stage, Paths.find())
    measured.stop()
    called: dict[str, list[str]] = {stage: [] for stage in stages.NAMES}
    data = measured.get_data()
    for path in map(Path, data.measured_files()):
        parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        contexts = data.contexts_by_lineno(str(path))
        for name, lines in _bodies(path).items():
            for stage in {context for line in lines for context in contexts.get(line, [])} & called.keys():
                called[stage].append(f"{module}:{name}")
    files.write_json(output, called)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
