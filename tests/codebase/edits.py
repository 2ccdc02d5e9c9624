"""Random edits of one line of a Python source."""

import ast
import io
import random
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Edit = Callable[[random.Random, str], str | None]
"""Gets a source and returns it edited, or None where there is nothing of the kind to edit."""


def says_nothing(rng: random.Random, source: str) -> str | None:
    """A comment, a docstring or the layout of a line."""
    return rng.choice([_comment, _docstring, _layout])(rng, source)


def constant(rng: random.Random, source: str) -> str | None:
    """Another value of a constant."""
    return _replaced(rng, source, _constants(ast.parse(source)), _another)


def new_import(rng: random.Random, source: str) -> str:
    """A line that imports something that nothing needs, before a statement of the top level."""
    starts = [
        min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        for place, node in enumerate(ast.parse(source).body)
        if (place or not isinstance(node, ast.Expr)) and getattr(node, "module", None) != "__future__"
    ]
    lines = source.splitlines(keepends=True)
    number = rng.choice(starts) - 1 if starts else len(lines)
    return "".join([*lines[:number], "import colorsys\n", *lines[number:]])


def default(rng: random.Random, source: str) -> str | None:
    """Another default of an argument."""
    given = [
        value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for value in (*node.args.defaults, *node.args.kw_defaults)
        if value is not None
    ]
    return _replaced(rng, source, given, lambda node: f"({ast.unparse(node)}, 1)")


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def _comment(rng: random.Random, source: str) -> str:
    ends = [token for token in _tokens(source) if token.type == tokenize.NEWLINE]
    if not ends:
        return source + "# Edited.\n"
    line, column = rng.choice(ends).start
    lines = source.splitlines(keepends=True)
    lines[line - 1] = f"{lines[line - 1][:column]}  # Edited.{lines[line - 1][column:]}"
    return "".join(lines)


def _docstring(rng: random.Random, source: str) -> str | None:
    holders = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    described = [node.body[0].value for node in holders if ast.get_docstring(node) is not None]
    return _replaced(rng, source, described, lambda node: repr(f"Edited. {node.value}"))


def _layout(rng: random.Random, source: str) -> str | None:
    opened, places = 0, []
    for token in _tokens(source):
        if token.type == tokenize.FSTRING_START:
            opened += 1
        elif token.type == tokenize.FSTRING_END:
            opened -= 1
        elif token.type == tokenize.OP and token.string in "([{" and not opened:
            places.append(token.end)
    if not places:
        return source + "\n\n"
    line, column = rng.choice(places)
    lines = source.splitlines(keepends=True)
    lines[line - 1] = f"{lines[line - 1][:column]}\n        {lines[line - 1][column:]}"
    return "".join(lines)


def _constants(node: ast.AST) -> Iterator[ast.Constant]:
    """Constants that are no statement of their own and no piece of an f-string."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant):
            if not isinstance(node, ast.Expr) and child.value is not ...:
                yield child
        elif not isinstance(child, ast.JoinedStr):
            yield from _constants(child)


def _another(node: ast.Constant) -> str:
    value = node.value
    if value is None or isinstance(value, bool):
        return repr(not value)
    return repr(value + ({str: "_edited", bytes: b"_edited"}.get(type(value), 1)))


def _replaced(
    rng: random.Random, source: str, nodes: Iterable[ast.expr], by: Callable[[Any], str]
) -> str | None:
    """Write another text in the place of one of some expressions."""
    found = list(nodes)
    if not found:
        return None
    node = rng.choice(found)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    lines = source.encode().splitlines(keepends=True)
    head = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    tail = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (head + by(node).encode() + tail).decode()
