"""The code of one function: its definition, what that uses of its own module, and the modules it imports.

A check is versioned by this. An import closure of its module would do, but for the other checks that stand
in the same file: editing one would run them all again.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.contract.canonical import sha256_json
from vpmoe_assets.codebase.bystanders import bystander
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.syntax import parse, tree_digest
from vpmoe_assets.codebase.tree import SourceTree


@dataclass(frozen=True)
class Definition:
    """The code of a function.

    Attributes:
        parts: Digest of what each definition says, by `module:name`; the function's own is `module:`, for its
            name says nothing.
        closure: Of the modules that these definitions import; None where there are none.
    """

    parts: Mapping[str, str]
    closure: Closure | None

    @property
    def digest(self) -> str:
        """Of definitions and closure together."""
        return sha256_json({"parts": dict(self.parts), "imports": self.closure and self.closure.digest})


def definition(
    tree: SourceTree, module: str, name: str, *, decorator: str, followed: Sequence[str]
) -> Definition:
    """Return the code of a function at the top level of a module.

    Args:
        tree: The sources.
        module: Dotted name.
        name: Of the function, or of the outermost one that it is defined in.
        decorator: Whose calls over a function are no part of its code.
        followed: Packages whose modules hold many things: of those only what is used counts.

    Raises:
        LookupError: There is no such module, or nothing of that name in it.
    """
    found = _Walk(tree, decorator, tuple(followed))
    found.visit(module, name, own=True)
    closure = tree.closure(sorted(found.roots)) if found.roots else None
    return Definition(dict(sorted(found.parts.items())), closure)


@dataclass
class _Walk:
    """Follows names from definition to definition."""

    tree: SourceTree
    decorator: str
    followed: tuple[str, ...]
    parts: dict[str, str] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)
    names: dict[str, dict[str, list[ast.stmt]]] = field(default_factory=dict)

    def visit(self, module: str, name: str, *, own: bool = False) -> None:
        key = f"{module}:{'' if own else name}"
        if key in self.parts:
            return
        known = self.statements(module)
        if name not in known:
            raise LookupError(f"{module} defines no {name} at its top level")
        bodies = [statement for statement in known[name] if not isinstance(statement, _IMPORT)]
        for statement in (statement for statement in known[name] if isinstance(statement, _IMPORT)):
            self.imported(statement, name)
        if not bodies:
            return
        self.parts[key] = self.digest(bodies, name if own else None)
        for node in (node for body in bodies for node in ast.walk(body)):
            if isinstance(node, ast.Name) and node.id in known and node.id != self.decorator:
                if node.id != name:
                    self.visit(module, node.id)
            elif isinstance(node, _IMPORT):
                self.imported(node, None)

    def imported(self, statement: ast.Import | ast.ImportFrom, name: str | None) -> None:
        """Follow the import of one name, or of all that a statement binds."""
        for alias in statement.names:
            if name is not None and (alias.asname or alias.name.partition(".")[0]) != name:
                continue
            if isinstance(statement, ast.Import):
                self.root(alias.name)
            elif f"{statement.module}.{alias.name}" in self.tree.modules:
                self.root(f"{statement.module}.{alias.name}")
            elif self.is_followed(str(statement.module)):
                self.visit(str(statement.module), alias.name)
            else:
                self.root(str(statement.module))

    def root(self, module: str) -> None:
        if module in self.tree.modules and bystander(module) is None:
            self.roots.add(module)

    def is_followed(self, module: str) -> bool:
        if module not in self.tree.modules or not any(module.startswith(f"{p}.") for p in self.followed):
            return False
        # The module of the decorator itself is the frame that all hang in, and no part of any.
        return not any(
            isinstance(s, ast.FunctionDef) for s in self.statements(module).get(self.decorator, ())
        )

    def statements(self, module: str) -> dict[str, list[ast.stmt]]:
        """Return the statements at the top level of a module by each name that they bind."""
        if module not in self.names:
            if module not in self.tree.modules:
                raise LookupError(f"{module} is no module below {self.tree.root}")
            path = self.tree.modules[module]
            bound: dict[str, list[ast.stmt]] = {}
            for statement in parse(self.tree.content[path], path).body:
                for name in _bound(statement):
                    bound.setdefault(name, []).append(statement)
            self.names[module] = bound
        return self.names[module]

    def digest(self, bodies: Sequence[ast.stmt], own: str | None) -> str:
        for node in (node for body in bodies for node in ast.walk(body)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.decorator_list = [each for each in node.decorator_list if not self.decorates(each)]
                if node.name == own:
                    node.name = "_"
        return tree_digest(ast.Module(body=list(bodies), type_ignores=[]))

    def decorates(self, node: ast.expr) -> bool:
        called = node.func if isinstance(node, ast.Call) else node
        return isinstance(called, ast.Name) and called.id == self.decorator


_IMPORT = ast.Import | ast.ImportFrom


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement binds at its own level."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, _IMPORT):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, _IMPORT):
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0]
