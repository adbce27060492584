"""The package's source as syntax trees: which definitions a module has, which names they use, and a hash of their code.

Code that influences no number is removed before hashing: comments, docstrings, log lines and error messages.
"""

import ast
import copy
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlv.io import files

PACKAGE = Path(__file__).resolve().parents[1]

_LOGGERS = {"log", "logger"}
_LEVELS = {"debug", "info", "warning", "error", "exception"}
# Fields of syntax trees that do not affect the computation, or that not all versions of Python have.
_NOT_CODE = {"ctx", "type_comment", "kind", "type_params"}
# The configuration's classes: the values of their fields are in a stage's inputs, so defaults are not hashed as code.
SETTINGS = "vlv.config"


@dataclass(frozen=True, order=True)
class Symbol:
    """A definition, such as `vlv.models.encoder`, `CaptionEncoder.features`; an empty name stands for the code that
    a module runs when it is imported."""

    module: str
    name: str

    @staticmethod
    def parse(text: str) -> "Symbol":
        """The symbol written as "module:name"."""
        module, _, name = text.partition(":")
        return Symbol(module, name)


@dataclass
class Module:
    """A parsed module: the origin of its names, its definitions, and the code that runs on import."""

    name: str
    imports: dict[str, str] = field(default_factory=dict)  # local name -> dotted name
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    statements: list[ast.stmt] = field(default_factory=list)


class _Cleaner(ast.NodeTransformer):
    """Removes code that influences no number from a copy of the tree."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        error = node.exc
        if isinstance(error, ast.Call):
            node.exc = ast.Call(error.func, [], [])
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):  # a docstring
            return ast.Pass()
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=level), args=arguments):
                # Unless a call in it has a side effect.
                works = any(isinstance(one, ast.Call) for argument in arguments for one in ast.walk(argument))
                if name in _LOGGERS and level in _LEVELS and not works:
                    return ast.Pass()
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        # Names imported from the package are hashed where they are defined.
        return ast.Pass() if (node.module or "").partition(".")[0] == "vlv" else node


class Sources:
    """The parsed modules of a package folder.

    Args:
        package: the folder `vlv`.
    """

    def __init__(self, package: Path = PACKAGE) -> None:
        self._package = package
        self._modules: dict[str, Module | None] = {}
        self._names: dict[Symbol, Names] = {}
        self._texts: dict[Symbol, str] = {}

    def hash(self, symbols: Iterable[Symbol]) -> str:
        """Hash of the code of some symbols of one module, without code that influences no number."""
        digest = hashlib.sha256()
        for symbol in symbols:
            if symbol not in self._texts:
                self._texts[symbol] = "\n".join(_text(_cleaned(node)) for node in self.nodes(symbol))
            digest.update(f"{symbol.name}\0{self._texts[symbol]}\n".encode())
        return digest.hexdigest()[:16]

    def module(self, name: str) -> Module | None:
        """A module by its dotted name; None if there is none."""
        if name not in self._modules:
            path = self._file(name)
            self._modules[name] = None if path is None else _parse(name, path)
        return self._modules[name]

    def _file(self, name: str) -> Path | None:
        first, *rest = name.split(".")
        if first != "vlv":
            return find(name)
        base = self._package.joinpath(*rest)
        return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if rest and p.is_file()), None)

    def names(self, symbol: Symbol) -> "Names":
        """The names in the code of a symbol."""
        if symbol not in self._names:
            module = self.module(symbol.module)
            assert module is not None
            self._names[symbol] = _names(self.nodes(symbol), module)
        return self._names[symbol]

    def nodes(self, symbol: Symbol) -> list[ast.stmt]:
        """The statements of a symbol: a class without its methods, a method, a function, a constant.

        Raises:
            KeyError: there is no such symbol.
        """
        module = self.module(symbol.module)
        if module is None:
            raise KeyError(f"there is no module {symbol.module}")
        if not symbol.name:
            return module.statements
        owner, _, method = symbol.name.partition(".")
        if owner not in module.definitions:
            raise KeyError(f"{symbol.module} has no {owner}")
        found = module.definitions[owner]
        if method:
            found = [node for one in found for node in methods(one) if node.name == method]
            if not found:
                raise KeyError(f"{symbol.module}: {owner} has no method {method}")
            return list(found)
        return [_without_methods(node, symbol.module) if isinstance(node, ast.ClassDef) else node for node in found]


def find(module: str) -> Path | None:
    """The file of a module outside this package, found without running any code of it; None if there is none."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)  # with the full module name it would import the parent packages
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    bases = [Path(folder).joinpath(*rest) for folder in spec.submodule_search_locations or []]
    return next((p for base in bases for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def names_of(module: Module) -> Iterator[str]:
    """Names of all definitions of a module: "Class", "Class.method", "function", "CONSTANT"."""
    for name, nodes in module.definitions.items():
        yield name
        yield from (f"{name}.{method.name}" for node in nodes for method in methods(node))


def methods(node: ast.stmt) -> list[ast.FunctionDef]:
    """The functions in a class body."""
    return [one for one in node.body if isinstance(one, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []


def _without_methods(node: ast.ClassDef, module: str) -> ast.ClassDef:
    settings = module.startswith(SETTINGS)
    dropped: tuple[type[ast.stmt], ...] = (ast.FunctionDef, ast.AnnAssign) if settings else (ast.FunctionDef,)
    body = [one for one in node.body if not isinstance(one, dropped)]
    return ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list)


def _parse(name: str, path: Path) -> Module:
    module = Module(name)
    _collect(module, ast.parse(files.read_text(path), str(path)).body)
    return module


def _collect(module: Module, body: list[ast.stmt]) -> None:
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom():
                module.imports |= dict(_imported(node))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                module.definitions.setdefault(node.name, []).append(node)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
                    module.definitions.setdefault(name, []).append(node)
            case ast.If(test=test) if "TYPE_CHECKING" in ast.dump(test):
                _collect(module, [one for one in node.body if isinstance(one, ast.ImportFrom)])
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                module.statements.append(node)


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Local name, dotted name."""
    if isinstance(node, ast.ImportFrom):
        yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    else:
        yield from ((a.asname or a.name.partition(".")[0], a.name) for a in node.names)


def _cleaned(node: ast.stmt) -> ast.AST:
    cleaned: ast.AST = _Cleaner().visit(copy.deepcopy(node))
    return cleaned


def _text(node: ast.AST) -> str:
    """A syntax tree as text, independent of the Python version and of the source's layout."""
    fields = []
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in _NOT_CODE:
            continue
        values = value if isinstance(value, list) else [value]
        inner = ",".join(_text(one) if isinstance(one, ast.AST) else repr(one) for one in values)
        fields.append(f"{name}={inner}")
    return f"{type(node).__name__}({';'.join(fields)})"


@dataclass
class Names:
    """The names in some code: definitions of its own module, imported names, and names after a dot."""

    local: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


def _names(nodes: list[ast.stmt], module: Module) -> Names:
    imports = dict(module.imports)
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                imports |= dict(_imported(inner))
    names = Names()
    for inner in (inner for node in nodes for inner in ast.walk(_cleaned(node))):
        match inner:
            case ast.Attribute(value=value, attr=attribute):
                names.attributes.add(attribute)
                if isinstance(value, ast.Name) and value.id in imports:
                    names.imported.add(f"{imports[value.id]}.{attribute}")
            case ast.Name(id=name) if name in module.definitions:
                names.local.add(name)
            case ast.Name(id=name) if name in imports:
                names.imported.add(imports[name])
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(attribute)), *_]):
                names.attributes.add(attribute)
    return names
