"""What one source file says of itself: its digest, what it imports, and which names of packages it uses."""

import ast
import hashlib
from dataclasses import dataclass
from typing import Any

from vpmoe_assets.codebase.syntax import parse, tree_digest

_BY_NAME = frozenset(
    {"import_module", "__import__", "run_module", "run_path", "exec_module", "load_module", "exec", "eval"}
)
"""Calls that load code by a name which only the running program knows."""


@dataclass(frozen=True)
class Facts:
    """One source file.

    Attributes:
        digest: Of what it says (`syntax.tree_digest`); of its bytes where it is no Python.
        eager: Dotted names that its top level imports: modules, or attributes of modules.
        lazy: And those that are imported inside functions.
        uses: Dotted names of other packages' things that it names, such as `numpy.random.Generator`; and
            texts that are dotted names, for a program can be run by them.
        dynamic: Lines that load code by a name known at run time only.
    """

    digest: str
    eager: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    dynamic: tuple[int, ...] = ()

    @property
    def imports(self) -> tuple[str, ...]:
        """All that it imports."""
        return (*self.eager, *self.lazy)

    def to_json(self) -> list[Any]:
        """Return the fields, for a cache."""
        return [self.digest, list(self.eager), list(self.lazy), list(self.uses), list(self.dynamic)]

    @classmethod
    def from_json(cls, fields: list[Any]) -> "Facts":
        """Return what `to_json` wrote."""
        digest, *rest = fields
        return cls(digest, *(tuple(values) for values in rest))


def facts_of(source: bytes, path: str) -> Facts:
    """Read a source file.

    Args:
        source: Its bytes.
        path: Relative to the project, POSIX form.

    Raises:
        SourceError: It ends in `.py` and does not parse.
    """
    if not path.endswith(".py"):
        return Facts(hashlib.sha256(source).hexdigest())
    tree = parse(source, path)
    found = _Found(_package(path))
    found.visit(tree, eager=True)
    return Facts(
        tree_digest(tree),
        tuple(sorted(found.eager)),
        tuple(sorted(found.lazy - found.eager)),
        tuple(sorted(found.uses)),
        tuple(sorted(found.dynamic)),
    )


def _package(path: str) -> list[str]:
    """Return the package that a file's relative imports start from."""
    return path.split("/")[:-1]


class _Found:
    """Collects the facts of one tree."""

    def __init__(self, package: list[str]) -> None:
        self.package = package
        self.eager: set[str] = set()
        self.lazy: set[str] = set()
        self.uses: set[str] = set()
        self.dynamic: set[int] = set()
        self.names: dict[str, str] = {}
        """What a local name was imported as."""

    def visit(self, node: ast.AST, *, eager: bool) -> None:
        """Walk a tree; what only a type checker reads is left out."""
        if isinstance(node, ast.If) and _only_for_types(node.test):
            for branch in node.orelse:
                self.visit(branch, eager=eager)
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._imported(node, self.eager if eager else self.lazy)
            return
        if isinstance(node, ast.Attribute | ast.Name):
            if (name := self._resolved(node)) is not None:
                self.uses.add(name)
                return
        elif isinstance(node, ast.Call):
            self._called(node, self.eager if eager else self.lazy)
        elif isinstance(node, ast.Constant):
            self._text(node)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            self.visit(child, eager=eager and not inside)

    def _imported(self, node: ast.Import | ast.ImportFrom, into: set[str]) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                into.add(alias.name)
                self.names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
            return
        base = node.module or ""
        if node.level:
            base = ".".join([*self.package[: len(self.package) - node.level + 1], *filter(None, [base])])
        into.add(base)
        for alias in node.names:
            # A module, or an attribute of one: which, only the tree of all files can say.
            into.add(f"{base}.{alias.name}")
            self.names[alias.asname or alias.name] = f"{base}.{alias.name}"

    def _resolved(self, node: ast.expr) -> str | None:
        """Return the full name of something imported, such as `np.random.Generator`."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self.names:
            return ".".join([self.names[node.id], *reversed(parts)])
        return None

    def _called(self, node: ast.Call, into: set[str]) -> None:
        function = node.func
        name = getattr(function, "attr", None) or getattr(function, "id", None)
        if name not in _BY_NAME:
            return
        if name in {"exec", "eval"} and isinstance(function, ast.Attribute):
            return  # a method that happens to be called so: `model.eval()`
        given = node.args[0] if node.args else None
        if isinstance(given, ast.Constant) and isinstance(given.value, str) and name == "import_module":
            into.add(given.value)
        else:
            self.dynamic.add(node.lineno)

    def _text(self, node: ast.Constant) -> None:
        if node.value == "-m":
            self.dynamic.add(node.lineno)
        elif isinstance(node.value, str) and "." in node.value and _is_dotted(node.value):
            self.uses.add(node.value)


def _is_dotted(text: str) -> bool:
    return len(text) < 100 and text.isascii() and all(part.isidentifier() for part in text.split("."))


def _only_for_types(test: ast.expr) -> bool:
    return (getattr(test, "id", None) or getattr(test, "attr", None)) == "TYPE_CHECKING"
