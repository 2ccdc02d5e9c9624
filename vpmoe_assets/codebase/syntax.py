"""The digest of what a Python source *says*: comments, docstrings, layout and quoting do not count.

The syntax tree is written out in a form of our own and hashed. `ast.dump` would not do: its text differs
between Python versions, and an upgrade of Python must not make everything again.
"""

import ast
import hashlib
from typing import Any

_SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields that follow from the place of a node, or say nothing to the interpreter."""

_FIELDS: dict[type, tuple[str, ...]] = {}
"""Fields that count, sorted, by class of node."""


class SourceError(ValueError):
    """A source file cannot be read as Python; the message names it."""


def parse(source: bytes, path: str) -> ast.Module:
    """Return the syntax tree of a Python source.

    Args:
        source: The file's bytes.
        path: Its name, for the message.

    Raises:
        SourceError: It does not parse.
    """
    try:
        return ast.parse(source, filename=path)
    except (SyntaxError, ValueError) as error:
        raise SourceError(f"{path} is no Python that this interpreter reads: {error}") from None


def tree_digest(tree: ast.Module) -> str:
    """Return the sha256 of a syntax tree, the same under every Python that parses the source alike.

    Left out are positions, docstrings and every other statement that is a bare string. All else counts,
    annotations too: they decide what pydantic and dataclasses do.
    """
    parts: list[str] = []
    _write(tree, parts.append)
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _write(value: Any, put: Any) -> None:
    """Write a node, a list of them, or a name; absent and empty fields are left out by the caller."""
    if isinstance(value, ast.Constant):
        put(_constant(value.value))
    elif isinstance(value, ast.JoinedStr):
        put("f(")
        for part in _joined(value.values):
            _write(part, put)
        put(")")
    elif isinstance(value, ast.AST):
        cls = value.__class__
        put(cls.__name__)
        put("(")
        for field in _FIELDS.get(cls) or _fields(cls):
            content: Any = getattr(value, field, None)
            if isinstance(content, list):
                content = [item for item in content if not _is_bare_text(item)] or None
            if content is None:
                continue
            if field == "format_spec" and not _joined(content.values):
                continue  # f"{x:}" is f"{x}", and not every Python keeps the difference
            put(field)
            put("=")
            _write(content, put)
        put(")")
    elif isinstance(value, list):
        put("[")
        for item in value:
            _write(item, put)
        put("]")
    elif isinstance(value, str):
        put(f"{len(value)}:{value}")
    elif value is None:
        put("-")  # an absent item of a list, such as the key of `{**more}`
    else:
        put(f"n{value};")  # a number that is part of the syntax, such as a conversion


def _fields(cls: type[ast.AST]) -> tuple[str, ...]:
    _FIELDS[cls] = tuple(sorted(set(cls._fields) - _SKIPPED))
    return _FIELDS[cls]


def _is_bare_text(item: Any) -> bool:
    """Whether something is a docstring, or another statement that is a string and no more."""
    return isinstance(item, ast.Expr) and _is_text(item.value)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """Return the parts of an f-string, neighbouring pieces of text merged and empty ones dropped."""
    merged: list[ast.expr] = []
    for part in values:
        if not _is_text(part):
            merged.append(part)
        elif part.value:  # type: ignore[attr-defined]
            if merged and _is_text(merged[-1]):
                part = ast.Constant(merged.pop().value + part.value)  # type: ignore[attr-defined]
            merged.append(part)
    return merged


def _constant(value: Any) -> str:
    """Return a constant with its type: `1`, `1.0` and `True` are equal and differ."""
    if isinstance(value, str):
        return f"s{len(value)}:{value}"
    if type(value) is int:
        return f"i{value:x};"  # hexadecimal: Python refuses to write very long integers in decimal
    return f"c{type(value).__name__} {value!r};"
