"""The codebase keeps its shape: imports run one way, nothing loads unsafely, the graph names what exists."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlv import config, stages
from vlv.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]

# Each level imports from lower ones only. Parts of one level do not import each other, except at the bottom.
_BOTTOM = 0
_LEVELS = {
    3: {"api", "cli", "__main__"},
    2: {"stages", "tiny", "plan", "convert", "inference"},
    1: {"data", "models", "training", "evaluation", "registry"},
    0: {"config", "inputs", "io", "rng", "tracking"},
}
_LEVEL = {name: level for level, names in _LEVELS.items() for name in names}
# Served models run alone, in MLflow's process, as a stage does. The registry and the flows read the table of metrics.
_EXCEPTIONS = {("registry", "models"), ("registry", "evaluation")}
_BAD_NAMES = {"utils", "util", "common", "helper", "helpers", "manager", "managers", "misc"}
_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere below `node`, except for types only (TYPE_CHECKING)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imports(child)


def _part(dotted: str) -> str:
    """vlv.data.shards.DataError -> data; vlv.__version__ -> nothing."""
    name = dotted.split(".")[1] if dotted.startswith("vlv.") else ""
    return name if name != "__version__" else ""


def _wrong_imports(path: Path) -> Iterator[str]:
    """What a file of the library imports against the rules."""
    own = path.relative_to(ROOT / "vlv").parts[0].removesuffix(".py")
    if own != "__init__" and own not in _LEVEL:
        yield f"{own} is a new part: give it its level above"
        return
    for dotted in _imports(_tree(path)):
        other, top = _part(dotted), dotted.split(".")[0]
        if own == "__init__":
            if dotted not in {"typing.TYPE_CHECKING", "typing.Any", "vlv.api"}:
                yield f"{dotted}: the package itself imports the public names alone, when they are used"
        elif top in {"prefect", "dvc", "flows", "tests"}:
            yield f"{dotted}: the library does not know it"
        elif top == "mlflow" and own not in {"tracking", "registry"}:
            yield f"{dotted}: only tracking and registry know MLflow"
        elif not other or other == own or (own, other) in _EXCEPTIONS:
            continue
        elif other not in _LEVEL:
            yield f"{dotted} is of no known part"
        elif not (_LEVEL[other] < _LEVEL[own] or _LEVEL[own] == _LEVEL[other] in (_BOTTOM, 3)):
            yield f"{dotted}, which is not below {own}"


def test_imports_run_one_way() -> None:
    assert [f"{path}: {wrong}" for path in _sources("vlv") for wrong in _wrong_imports(path)] == []


def test_flows_reach_down_to_the_bottom_and_the_table_of_metrics_only() -> None:
    for path in _sources("flows"):
        found = {_part(dotted) for dotted in _imports(_tree(path)) if dotted != "vlv.evaluation.metrics"} - {""}
        assert found <= {"config", "io", "tracking"}, path


# Pickled tensors are read here, with weights_only, and nowhere else.
_CONVERTER = Path("vlv/convert/checkpoints.py")
# Text, JSON and YAML are read here, where each failure names the file.
_FILES = Path("vlv/io/files.py")


def _unsafe(call: ast.Call, *, in_converter: bool = False, in_files: bool = False) -> str | None:
    """What makes a call unsafe, if anything."""
    function = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}

    def is_constant(name: str, value: bool) -> bool:
        node = given.get(name)
        return isinstance(node, ast.Constant) and node.value is value

    if function in {"yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "os.popen"}:
        return function
    if function == "torch.load" and not (is_constant("weights_only", True) and in_converter):
        return function
    if is_constant("shell", True):
        return "shell=True"
    loads = function.rpartition(".")[2] in {"from_pretrained", "from_config"}
    if (loads or "trust_remote_code" in given) and not is_constant("trust_remote_code", False):
        return "trust_remote_code"  # left out, transformers may ask on standard input, and run the code on a "y"
    if function in {"json.load", "json.loads", "yaml.safe_load", "yaml.safe_load_all"} and not in_files:
        return function
    if function.endswith(".read_text") and function != "files.read_text" and not in_files and "errors" not in given:
        return "read_text"
    if function != "zip" and is_constant("strict", False):
        return "strict=False"
    return None


def _unsafe_lines(path: Path) -> Iterator[str]:
    """What a file calls, imports or changes against the rules."""
    tree = _tree(path)
    inside, reader = (path.relative_to(ROOT) == one for one in (_CONVERTER, _FILES))
    for node in ast.walk(tree):
        found = _unsafe(node, in_converter=inside, in_files=reader) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found = "sys.path"
        if found:
            yield f"line {node.lineno}: {found}"
    yield from sorted({dotted.split(".")[0] for dotted in _imports(tree)} & _PICKLES)


def test_nothing_loads_or_runs_unsafely() -> None:
    assert [
        f"{path}: {wrong}" for path in _sources("vlv", "flows", "benchmarks") for wrong in _unsafe_lines(path)
    ] == []


def test_the_rules_above_can_fail() -> None:
    bad = "import pickle\ntorch.load(f)\nm.load_state_dict(s, strict=False)\nrun('x', shell=True)\n"
    bad += "from_pretrained(n, trust_remote_code=True)\nA.from_config(c)\nzip(a, b, strict=False)\n"
    bad += "B.from_pretrained(n, trust_remote_code=False)\njson.loads(t)\npath.read_text()\nfiles.read_text(path)\n"
    tree = ast.parse(bad)
    found = sorted(filter(None, [_unsafe(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]))
    unsafe = ["json.loads", "read_text", "shell=True", "strict=False", "torch.load"]
    assert found == [*unsafe, "trust_remote_code", "trust_remote_code"]
    assert list(_imports(tree)) == ["pickle"]


def test_pickled_tensors_are_read_in_the_converter_only_and_as_weights_only() -> None:
    def call(text: str) -> ast.Call:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call)
        return node

    safe = call("torch.load(f, weights_only=True)")
    assert _unsafe(safe, in_converter=True) is None and _unsafe(safe) == "torch.load"
    for text in ("torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)"):
        assert _unsafe(call(text), in_converter=True) == "torch.load"
    assert "torch.load(" in (ROOT / _CONVERTER).read_text(encoding="utf-8")


def test_only_flows_import_prefect_and_file_names_say_what_is_inside() -> None:
    assert any("prefect" in dotted for path in _sources("flows") for dotted in _imports(_tree(path)))
    everything = _sources("vlv", "flows", "tests")
    assert [path for path in everything if path.stem in _BAD_NAMES] == []
    assert [path for path in (ROOT / "mlflow").rglob("*.py") if "store" not in path.parts] == []


def _graph() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return value


def test_stages_of_the_graph_are_those_of_the_library_and_the_command_line() -> None:
    assert set(_graph()) == set(stages.NAMES) == {stage.value for stage in cli.StageName}
    for name, stage in _graph().items():
        assert stage["cmd"] == f"python -m vlv run {name}"


def test_every_profile_fits_the_schema_and_the_graph() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        parsed = config.parse(path.read_text(encoding="utf-8"), path.name)
        assert parsed.profile == path.stem
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        for stage in _graph().values():
            for key in filter(lambda entry: isinstance(entry, str), stage["params"]):  # not the whole file
                value: Any = raw
                for step in key.split("."):
                    assert step in value, f"{path.name} lacks {key}, which dvc.yaml tracks"
                    value = value[step]
