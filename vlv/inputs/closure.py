"""The code that decides a result: everything a function reaches by name, as one hash for each module.

`reached` starts at some functions and follows the names in their source to the package's other functions, classes
and constants. A method belongs to it only if its class is reached and its name is used somewhere in reached code
(rapid type analysis, Bacon and Sweeney 1996, by name), so that a change of `Captioner.write` is no change of the
training. What decides no number is left out before hashing: comments, docstrings, log lines and the words of errors.

Not seen are names that are put together while the program runs. The package has two such places, the stages and the
kinds of decoders, and their modules are given as roots. tests/test_closure.py runs every stage and holds the
functions that were really called to the ones found here.
"""

import ast
import copy
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlv.io import files

PACKAGE = Path(__file__).resolve().parents[1]

# Modules that decide no weight and no figure, so that a change of them makes no result stale.
NEUTRAL = (
    "vlv.io.assets",  # fetches files; their contents are hashed by whoever uses them
    "vlv.inputs",  # names what a result is made from
    "vlv.stages.lineage",
    "vlv.stages.adoption",
    "vlv.io.files",  # moves bytes; a number that passes through it is written and read as it is
    "vlv.tracking",  # MLflow's records
    "vlv.io.tables",  # what is shown and logged
    "vlv.io.telemetry",  # switches of libraries
    "vlv.io.progress",  # the screen
    "vlv.evaluation.report",  # plots and cards
    "vlv.training.energy",  # costs
    "vlv.training.ledger",
)

_LOGGERS = {"log", "logger"}
_LEVELS = {"debug", "info", "warning", "error", "exception"}
# Decorators that leave it to callers whether a method runs. Any other may register it somewhere.
_PLAIN_DECORATORS = {
    "property", "staticmethod", "classmethod", "abstractmethod", "contextmanager", "contextlib.contextmanager",
    "functools.cached_property", "functools.cache", "torch.no_grad", "final", "override",
}  # fmt: skip
# Bases from outside the package that call no method of a class by a name of their own choice. `nn.Module` calls
# `forward`, which is always taken.
_PLAIN_BASES = {"ABC", "Protocol", "Generic", "nn.Module", "NamedTuple", "StrEnum", "Enum"}
_ALWAYS = {"forward"}
# Fields of syntax trees that say nothing about what is computed, or that not all versions of Python have.
_NOT_CODE = {"ctx", "type_comment", "kind", "type_params"}
# The configuration's classes: the values of their fields stand in a stage's inputs, so defaults are not code.
_SETTINGS = "vlv.config"


@dataclass(frozen=True, order=True)
class Symbol:
    """A definition: `vlv.models.encoder`, `CaptionEncoder.features`; an empty name is what a module runs when it is
    imported."""

    module: str
    name: str

    @staticmethod
    def parse(text: str) -> "Symbol":
        """The symbol written as "module:name"."""
        module, _, name = text.partition(":")
        return Symbol(module, name)


@dataclass
class _Module:
    """A parsed module: where its names come from, its definitions, and what it does when it is imported."""

    name: str
    imports: dict[str, str] = field(default_factory=dict)  # local name -> dotted name
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    statements: list[ast.stmt] = field(default_factory=list)


class _Cleaner(ast.NodeTransformer):
    """Takes out of a copy of the tree what decides no number."""

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
                # Unless a call in it does something besides.
                works = any(isinstance(one, ast.Call) for argument in arguments for one in ast.walk(argument))
                if name in _LOGGERS and level in _LEVELS and not works:
                    return ast.Pass()
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        # What is used of the package is hashed where it is defined.
        return ast.Pass() if (node.module or "").partition(".")[0] == "vlv" else node


class Sources:
    """The parsed modules of a package folder.

    Args:
        package: the folder `vlv`.
    """

    def __init__(self, package: Path = PACKAGE) -> None:
        self._package = package
        self._modules: dict[str, _Module | None] = {}
        self._names: dict[Symbol, _Names] = {}
        self._texts: dict[Symbol, str] = {}

    def reached(self, roots: Iterable[str]) -> dict[str, str]:
        """Modules with code that `roots` ("module:name", name may be "Class.method") reach -> hash of that code.

        Raises:
            KeyError: a root that does not exist.
        """
        symbols = _Walk(self).run([Symbol.parse(root) for root in roots])
        by_module: dict[str, list[Symbol]] = {}
        for symbol in sorted(symbols):
            by_module.setdefault(symbol.module, []).append(symbol)
        return {name: self._hash(found) for name, found in by_module.items()}

    def symbols(self, roots: Iterable[str]) -> set[Symbol]:
        """As `reached`, the symbols themselves."""
        return _Walk(self).run([Symbol.parse(root) for root in roots])

    def _hash(self, symbols: list[Symbol]) -> str:
        digest = hashlib.sha256()
        for symbol in symbols:
            if symbol not in self._texts:
                self._texts[symbol] = "\n".join(_text(_cleaned(node)) for node in self.nodes(symbol))
            digest.update(f"{symbol.name}\0{self._texts[symbol]}\n".encode())
        return digest.hexdigest()[:16]

    def module(self, name: str) -> _Module | None:
        """A module of the package by its dotted name; None if there is none."""
        if name not in self._modules:
            path = self._file(name)
            self._modules[name] = None if path is None else _parse(name, path)
        return self._modules[name]

    def _file(self, name: str) -> Path | None:
        first, *rest = name.split(".")
        if first != "vlv":
            return None
        base = self._package.joinpath(*rest)
        return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if rest and p.is_file()), None)

    def names(self, symbol: Symbol) -> "_Names":
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


def methods(node: ast.stmt) -> list[ast.FunctionDef]:
    """The functions in a class body."""
    return [one for one in node.body if isinstance(one, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []


def _without_methods(node: ast.ClassDef, module: str) -> ast.ClassDef:
    settings = module.startswith(_SETTINGS)
    dropped: tuple[type[ast.stmt], ...] = (ast.FunctionDef, ast.AnnAssign) if settings else (ast.FunctionDef,)
    body = [one for one in node.body if not isinstance(one, dropped)]
    return ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list)


def _parse(name: str, path: Path) -> _Module:
    module = _Module(name)
    _collect(module, ast.parse(files.read_text(path), str(path)).body)
    return module


def _collect(module: _Module, body: list[ast.stmt]) -> None:
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
    """A syntax tree as text, the same in all versions of Python and however the source is laid out."""
    fields = []
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in _NOT_CODE:
            continue
        values = value if isinstance(value, list) else [value]
        inner = ",".join(_text(one) if isinstance(one, ast.AST) else repr(one) for one in values)
        fields.append(f"{name}={inner}")
    return f"{type(node).__name__}({';'.join(fields)})"


@dataclass
class _Names:
    """What some code names: definitions of its own module, imported things, and whatever follows a dot."""

    local: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


def _names(nodes: list[ast.stmt], module: _Module) -> _Names:
    imports = dict(module.imports)
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                imports |= dict(_imported(inner))
    names = _Names()
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


class _Walk:
    """One search from some roots."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._found: set[Symbol] = set()
        self._todo: list[Symbol] = []
        self._used: set[str] = set()  # names after a dot, in reached code
        self._waiting: dict[str, set[Symbol]] = {}  # method name -> methods of reached classes, not reached yet

    def run(self, roots: list[Symbol]) -> set[Symbol]:
        for root in roots:
            self._sources.nodes(root)  # raises where there is none
            self._reach(root)
            owner, dot, _ = root.name.partition(".")
            if dot:
                self._reach(Symbol(root.module, owner))
        while self._todo:
            self._follow(self._todo.pop())
        return {symbol for symbol in self._found if self._sources.nodes(symbol)}

    def _reach(self, symbol: Symbol) -> None:
        if symbol in self._found or symbol.module.startswith(NEUTRAL):
            return
        self._found.add(symbol)
        self._todo.append(symbol)
        if symbol.name:
            self._reach(Symbol(symbol.module, ""))

    def _follow(self, symbol: Symbol) -> None:
        names = self._sources.names(symbol)
        for name in names.attributes:
            self._use(name)
        for local in names.local:
            self._reach(Symbol(symbol.module, local))
        for dotted in names.imported:
            self._dotted(dotted)
        module = self._sources.module(symbol.module)
        assert module is not None
        for node in module.definitions.get(symbol.name, []):
            if isinstance(node, ast.ClassDef):
                self._class(symbol, node, module)

    def _use(self, name: str) -> None:
        if name not in self._used:
            self._used.add(name)
            for method in self._waiting.pop(name, set()):
                self._reach(method)

    def _dotted(self, dotted: str) -> None:
        """Reach what an imported name stands for, through modules that only pass it on."""
        parent, _, name = dotted.rpartition(".")
        if dotted.startswith(NEUTRAL) or not dotted.startswith("vlv."):
            return
        module = self._sources.module(parent)
        if module is not None and name in module.definitions:
            self._reach(Symbol(parent, name))
        elif module is not None and module.imports.get(name, dotted) != dotted:
            self._reach(Symbol(parent, ""))
            self._dotted(module.imports[name])
        elif self._sources.module(dotted) is not None:
            self._reach(Symbol(dotted, ""))  # a module; its members are reached where they are named

    def _class(self, owner: Symbol, node: ast.ClassDef, module: _Module) -> None:
        """Let the methods of a reached class wait for their names, or reach those that something else may call."""
        foreign = any(not self._plain(base, module) for base in node.bases)
        for method in methods(node):
            symbol = Symbol(owner.module, f"{owner.name}.{method.name}")
            decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in method.decorator_list}
            registered = any(d not in _PLAIN_DECORATORS and not d.endswith(".setter") for d in decorators)
            settings = owner.module.startswith(_SETTINGS)
            called = method.name in _ALWAYS or method.name.startswith("__") or method.name in self._used
            if called or (not settings and (foreign or registered)):
                self._reach(symbol)
            else:
                self._waiting.setdefault(method.name, set()).add(symbol)

    def _plain(self, base: ast.expr, module: _Module) -> bool:
        """Whether a base class is the package's own, or one that calls nothing by itself."""
        bare = base.value if isinstance(base, ast.Subscript) else base
        name = ast.unparse(bare)
        first = name.partition(".")[0]
        own = first in module.definitions or module.imports.get(first, "").startswith("vlv.")
        return own or name in _PLAIN_BASES or name.endswith(("Error", "Exception"))


@functools.cache
def sources() -> Sources:
    """Those of this package, parsed once a process."""
    return Sources()


def code_hash(*roots: str) -> str:
    """One hash of all the code that `roots` reach: what a cache of their results is known by."""
    found = sources().reached(roots)
    return hashlib.sha256("".join(f"{name}:{digest}\n" for name, digest in sorted(found.items())).encode()).hexdigest()
