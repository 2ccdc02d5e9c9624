"""Hostile bytes and hostile values, made out of good ones."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import strategies as st

from trainer.contract.canonical import UnstableValueError
from vpmoe_assets.lineage.errors import LineageError

ODD_NUMBERS = (
    *(0, -1, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(10**400, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, True, False, None),
)
ODD_TEXTS = (
    *(
        "",
        ".",
        "..",
        "../../outside",
        "/etc/passwd",
        "a/../../b",
        "a\0b",
        "\ud800",
        "a\nb",
        "\u202e",
        "é" * 300,
    ),
    *("NaN", "1e999", "__class__", "$", "\ufeff", "x" * 10_000, "\x1b[2J", "2026-13-45T99:99:99", "sha256:"),
)


def deep(depth: int, key: str | None) -> Any:
    """A value nested so deeply, in lists or in objects."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


@cache
def odd_values() -> st.SearchStrategy[Any]:
    """A JSON value that does not belong where it is put."""
    return st.one_of(
        st.sampled_from(ODD_NUMBERS),
        st.sampled_from(ODD_TEXTS),
        st.sampled_from(([], {}, [[]], [{}], {"": None}, [None] * 1000, {"a": [1, {"b": math.nan}]})),
        st.builds(deep, st.sampled_from((3, 60, 400)), st.sampled_from((None, "a"))),
        st.integers(),
        st.floats(),
        st.text(st.characters(), max_size=20),
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += _places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found += _places(item, (*path, number))
    return found


def _changed(value: Any, path: tuple[Any, ...], change: tuple[str, Any]) -> Any:
    what, new = change
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = _changed(copy[path[0]], path[1:], change)
    elif what == "drop":
        del copy[path[0]]
    elif what == "twice" and isinstance(copy, list):
        copy.insert(path[0], copy[path[0]])
    elif what == "rename" and isinstance(copy, dict):
        copy[new if isinstance(new, str) else "renamed"] = copy.pop(path[0])
    else:
        copy[path[0]] = new
    return copy


_TIMES = st.integers(1, 3)
_WHAT = st.sampled_from(("put", "put", "put", "drop", "rename", "twice"))


@st.composite
def changed_values(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places replaced, dropped, renamed or doubled."""
    for _ in range(draw(_TIMES)):
        path = draw(st.sampled_from(_places(value)))
        what = draw(_WHAT)
        value = _changed(value, path, (what, draw(odd_values())))
    return value


def as_json(value: Any) -> bytes:
    """JSON, in which NaN, infinities and lone surrogates stand as Python writes them."""
    return json.dumps(value).encode("ascii")


RAW_JSON = (
    *(
        b"",
        b"\x00",
        b"{",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"[" * 1000 + b"]" * 1000,
        b"nul",
        b"\xff\xfe[\x00]\x00",
    ),
    *(
        b"9" * 5000,
        b"-",
        b"1e999999",
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        b"[1]" * 3,
        b"NaN",
        b'{"a":1,"a":2}',
        b"{}",
    ),
)


def changed_bytes(
    content: bytes, widths: tuple[int, ...] = (1, 2, 4, 8), most: int = 4
) -> st.SearchStrategy[bytes]:
    """Bytes with a few of them overwritten (by odd little-endian numbers too), cut, doubled or added."""

    def apply(edits: list[tuple[str, float, int, int, bytes]]) -> bytes:
        changed = bytearray(content)
        for what, where, width, number, new in edits:
            at = int(where * len(changed))
            if what == "number":
                changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
            elif what == "flip" and at < len(changed):
                changed[at] ^= 1 << number % 8
            elif what == "cut":
                del changed[at:]
            elif what == "drop":
                del changed[at : at + width]
            elif what == "double":
                changed[at:at] = changed[max(0, at - 16 * width) : at]
            else:
                changed[at:at] = new
        return bytes(changed)

    numbers = st.one_of(
        st.integers(0, 2**64 - 1), st.sampled_from([n for n in ODD_NUMBERS if type(n) is int])
    )
    edit = st.tuples(
        st.sampled_from(("number", "number", "flip", "flip", "cut", "drop", "double", "insert")),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(widths),
        numbers,
        st.binary(max_size=12),
    )
    return st.lists(edit, min_size=1, max_size=most).map(apply)


def json_files(value: Any, seal: Callable[[Any], Any] = lambda value: value) -> st.SearchStrategy[bytes]:
    """A JSON file: its value changed and sealed again, its bytes changed, or nothing like it.

    Args:
        value: Of a good file.
        seal: Puts right what a changed value has to agree with: a forger knows how.
    """

    def sealed(changed: Any) -> bytes:
        try:
            return as_json(seal(changed))
        except (
            LineageError,
            AttributeError,
            TypeError,
            ValueError,
            LookupError,
            RecursionError,
            UnstableValueError,
        ):
            return as_json(changed)

    return st.one_of(
        changed_values(value).map(sealed),
        changed_values(value).map(sealed),
        changed_bytes(as_json(value), (1,)),
        st.integers(0, len(RAW_JSON) - 1).map(RAW_JSON.__getitem__),
    )
