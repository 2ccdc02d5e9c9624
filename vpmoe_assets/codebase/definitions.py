"""Which functions and classes of a file say another thing than they did."""

import ast
from collections.abc import Iterator

from vpmoe_assets.codebase.syntax import parse, tree_digest

IMPORTS = "imports"
REST = "top level"
"""What a file says outside of functions, classes and imports, where it binds no name."""

_Def = ast.FunctionDef | ast.AsyncFunctionDef
_Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def changed_definitions(old: bytes, new: bytes, path: str) -> tuple[str, ...]:
    """Return the names of what differs between two states of a Python file, in the order of the new one.

    A method counts by itself, as `Class.method`; comments, docstrings and layout do not count.

    Args:
        old: The file's bytes.
        new: The same, later.
        path: Its name, for messages.

    Raises:
        SourceError: One of them does not parse.
    """
    before, after = dict(_parts(parse(old, path).body)), dict(_parts(parse(new, path).body))
    return tuple(name for name in {**after, **before} if before.get(name) != after.get(name))


def _parts(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and digest of each part of a module, or of a class."""
    gathered: dict[str, list[ast.stmt]] = {}
    for statement in body:
        if isinstance(statement, ast.ClassDef) and not prefix:
            methods = [each for each in statement.body if isinstance(each, _Def)]
            yield from _parts([*methods], f"{statement.name}.")
            statement.body = [each for each in statement.body if not isinstance(each, _Def)]
        gathered.setdefault(prefix + _name(statement), []).append(statement)
    for name, statements in gathered.items():
        yield name, tree_digest(ast.Module(body=statements, type_ignores=[]))


def _name(statement: ast.stmt) -> str:
    if isinstance(statement, _Named):
        return statement.name
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return IMPORTS
    target: ast.expr | None = None
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        target = statement.target
    return target.id if isinstance(target, ast.Name) else REST
