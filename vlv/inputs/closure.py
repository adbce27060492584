"""The code that decides a result: everything that a function reaches by name.

`symbols` starts at some functions and follows the names in their source to the package's other functions, classes
and constants. A method belongs to it only if its class is reached and its name is used somewhere in reached code
(rapid type analysis, Bacon and Sweeney 1996, by name), so that a change of `Captioner.save` does not count as a
change of the training.

Names that are composed at run time are not found. The package has two such places, the stages and the kinds of
decoders, and their modules are given as roots. tests/test_closure.py runs every stage and compares the called
functions with those found here.

For a kind of decoder outside this package, the names of its own package are followed too.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable

from vlv.inputs import source
from vlv.inputs.source import Module, Sources, Symbol

# Modules that influence no weight and no figure, so a change of them makes no result stale.
NEUTRAL = (
    "vlv.io.assets",  # fetches files; the code that uses them hashes their contents
    "vlv.inputs",  # computes these hashes
    "vlv.stages.inputs",
    "vlv.stages.adoption",
    "vlv.io.json_lines",
    "vlv.io.files",  # moves bytes and changes no number
    "vlv.tracking",  # MLflow's records
    "vlv.io.tables",  # display and logs
    "vlv.io.telemetry",  # switches of libraries
    "vlv.io.progress",  # progress display
    "vlv.evaluation.figures",  # plots and cards
    "vlv.training.ledger",  # costs
)

# With these decorators a method runs only if it is called. Any other may register it somewhere.
_PLAIN_DECORATORS = {
    "property", "staticmethod", "classmethod", "abstractmethod", "contextmanager", "contextlib.contextmanager",
    "functools.cached_property", "functools.cache", "torch.no_grad", "final", "override",
}  # fmt: skip
# Base classes outside the package that do not call a subclass's methods themselves. `nn.Module` calls `forward`,
# which is always included.
_PLAIN_BASES = {"ABC", "Protocol", "Generic", "nn.Module", "NamedTuple", "StrEnum", "Enum"}
_ALWAYS = {"forward"}


@functools.cache
def _package() -> Sources:
    """The sources of this package, parsed once per process."""
    return Sources()


def symbols(roots: Iterable[str], sources: Sources | None = None) -> set[Symbol]:
    """The definitions reached from `roots` ("module:name", where name may be "Class.method").

    Args:
        sources: those of another copy of the package.

    Raises:
        KeyError: a root that does not exist.
    """
    return _Walk(sources or _package()).run([Symbol.parse(root) for root in roots])


def hashes(roots: Iterable[str], sources: Sources | None = None) -> dict[str, str]:
    """Module -> hash of its code reached from `roots`. Arguments and errors are those of `symbols`."""
    by_module: dict[str, list[Symbol]] = {}
    for symbol in sorted(symbols(roots, sources)):
        by_module.setdefault(symbol.module, []).append(symbol)
    return {name: (sources or _package()).hash(found) for name, found in by_module.items()}


def code_hash(*roots: str) -> str:
    """One hash of all code reached from `roots`; it identifies a cache of their results."""
    found = "".join(f"{name}:{digest}\n" for name, digest in sorted(hashes(roots).items()))
    return hashlib.sha256(found.encode()).hexdigest()


def definitions(module: str) -> list[str]:
    """All definitions of a module and their methods, as roots; none if there is no such module."""
    found = _package().module(module)
    return [] if found is None else [f"{module}:", *(f"{module}:{name}" for name in source.names_of(found))]


class _Walk:
    """One search from given roots."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._found: set[Symbol] = set()
        self._todo: list[Symbol] = []
        self._used: set[str] = set()  # names after a dot, in reached code
        self._waiting: dict[str, set[Symbol]] = {}  # method name -> methods of reached classes, not reached yet
        self._packages = {"vlv"}  # names of these packages are followed

    def run(self, roots: list[Symbol]) -> set[Symbol]:
        self._packages |= {root.module.partition(".")[0] for root in roots}
        for root in roots:
            self._sources.nodes(root)  # raises if there is none
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
        """Reach the definition of an imported name, through modules that only re-export it."""
        parent, _, name = dotted.rpartition(".")
        if dotted.startswith(NEUTRAL) or not self._followed(dotted):
            return
        module = self._sources.module(parent)
        if module is not None and name in module.definitions:
            self._reach(Symbol(parent, name))
        elif module is not None and module.imports.get(name, dotted) != dotted:
            self._reach(Symbol(parent, ""))
            self._dotted(module.imports[name])
        elif self._sources.module(dotted) is not None:
            self._reach(Symbol(dotted, ""))  # a module; its members are reached by their own names

    def _followed(self, dotted: str) -> bool:
        package, dot, _ = dotted.partition(".")
        return package in self._packages and bool(dot)

    def _class(self, owner: Symbol, node: ast.ClassDef, module: Module) -> None:
        """Queue the methods of a reached class until their names are used; reach those that other code may call."""
        foreign = any(not self._plain(base, module) for base in node.bases)
        for method in source.methods(node):
            symbol = Symbol(owner.module, f"{owner.name}.{method.name}")
            decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in method.decorator_list}
            registered = any(d not in _PLAIN_DECORATORS and not d.endswith(".setter") for d in decorators)
            settings = owner.module.startswith(source.SETTINGS)
            called = method.name in _ALWAYS or method.name.startswith("__") or method.name in self._used
            if called or (not settings and (foreign or registered)):
                self._reach(symbol)
            else:
                self._waiting.setdefault(method.name, set()).add(symbol)

    def _plain(self, base: ast.expr, module: Module) -> bool:
        """Whether a base class is the package's own, or one that calls no methods by itself."""
        bare = base.value if isinstance(base, ast.Subscript) else base
        name = ast.unparse(bare)
        first = name.partition(".")[0]
        own = first in module.definitions or self._followed(module.imports.get(first, ""))
        return own or name in _PLAIN_BASES or name.endswith(("Error", "Exception"))
