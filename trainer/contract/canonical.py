"""One text for one value: the canonical JSON that every hash of this project is taken over.

ASCII JSON with sorted keys and floats in the shortest form that reads back equal; compact where it is
hashed, indented where a person reads it. Whatever has no stable form (NaN, sets, bytes, paths, functions,
objects with an address in their `repr`) is refused with the key path at which it stands, because a hash
over it would differ tomorrow for no reason.
"""

import hashlib
import json
import math
from typing import Any

_SCALARS = (str, int, bool, type(None))


class UnstableValueError(Exception):
    """A value has no stable canonical form, so it may not enter a hash."""


def canonical_json(value: Any, *, indent: int | None = None) -> str:
    """Return the canonical JSON of a value; equal values give equal text.

    Tuples are written as lists. Integers and floats stay apart (`1` and `1.0` differ).

    Args:
        value: Dicts with string keys, lists, tuples, strings, integers, finite floats, booleans and None.
        indent: Spaces per level for people; None gives the compact form that is hashed.

    Raises:
        UnstableValueError: For anything else, naming the key path and the type found.
    """
    _check(value, "$", ())
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=separators)


def sha256_json(value: Any) -> str:
    """Return the sha256, in hex, of the compact `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def _check(obj: Any, path: str, parents: tuple[int, ...]) -> None:
    # Exact types only: a subclass (numpy.float64 is a float, an enum may be a str) carries a meaning of its
    # own that JSON drops, and the next release of its library may print it differently.
    if type(obj) in _SCALARS:
        return
    if type(obj) is float:
        if not math.isfinite(obj):
            raise UnstableValueError(f"{path}: {obj!r} has no JSON form; store null or leave the key out")
        return
    if isinstance(obj, dict | list | tuple):
        if id(obj) in parents:
            raise UnstableValueError(f"{path}: the value contains itself")
        parents = (*parents, id(obj))
    if isinstance(obj, dict):
        for key, value in obj.items():
            if type(key) is not str:
                raise UnstableValueError(f"{path}: key {key!r} is {_kind(key)}; keys must be strings")
            _check(value, f"{path}.{key}", parents)
    elif isinstance(obj, list | tuple):
        for position, value in enumerate(obj):
            _check(value, f"{path}[{position}]", parents)
    else:
        raise UnstableValueError(
            f"{path}: a value of type {_kind(obj)} has no stable form; "
            "convert it to a string, number, boolean, list or dict first"
        )


def _kind(obj: Any) -> str:
    cls = type(obj)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
