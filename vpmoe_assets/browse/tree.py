"""Plain values as a tree that folds: a record has thousands, and a template took most of its page's time."""

import json
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup, escape

_OPEN = 12
"""A branch of the first level is open where it has no more entries."""


def tree(value: Any) -> Markup:
    """Return nested lists and mappings as HTML lists; every text in them is escaped.

    Args:
        value: Of JSON's kinds.
    """
    return Markup("".join(_parts(value, 0)))


def _parts(value: Any, depth: int) -> Iterator[str]:
    if not _branches(value):
        yield _leaf(value)
    elif isinstance(value, dict):
        yield "<ul>\n"
        for name, item in value.items():
            if _branches(item):
                unfolded = " open" if depth < 1 and len(item) <= _OPEN else ""
                yield f"<li><details{unfolded}><summary><b>{escape(name)}</b> "
                yield f'<span class="faint">{len(item)}</span></summary>'
                yield from _parts(item, depth + 1)
                yield "</details></li>\n"
            else:
                yield f"<li><b>{escape(name)}</b> {_leaf(item)}</li>\n"
        yield "</ul>"
    else:
        yield '<ol start="0">\n'
        for item in value:
            yield "<li>"
            yield from _parts(item, depth + 1)
            yield "</li>\n"
        yield "</ol>"


def _branches(value: Any) -> bool:
    return isinstance(value, dict | list) and bool(value)


def _leaf(value: Any) -> str:
    if value is None or value in ([], {}):
        return '<span class="faint">none</span>'
    plain = isinstance(value, str) and value.strip() == value
    return f"<code>{escape(value if plain else json.dumps(value, ensure_ascii=False))}</code>"
