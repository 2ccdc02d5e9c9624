"""One byte sequence for one value: the canonical JSON that every hash of this project is taken over.

ASCII JSON, keys sorted, no white space, floats in the shortest form that reads back equal. Whatever has no
stable form (NaN, sets, bytes, paths, functions, objects with an address in their `repr`) is refused with
the key path at which it stands, because a hash over it would differ tomorrow for no reason.
"""

import hashlib
import json
import math
from typing import Any

from vpmoe_assets.lineage.errors import UnstableValueError

VOLATILE_KEYS = frozenset(
    {
        # when
        "created_unix_s",
        "created_utc",
        "elapsed_s",
        "duration_s",
        # by which code: the source digests of the recipe fingerprint say this better
        "git_sha",
        "git_dirty",
        # where
        "host",
        "hostname",
        "dataset_dir",
        "input_dir",
        "output_dir",
        "manifest_path",
        "model_path",
        "tokenizer_dir",
    }
)
"""Manifest keys that say when, where and from which checkout, and nothing about the bytes."""

_SCALARS = (str, int, bool, type(None))


def canonical_json(obj: Any) -> bytes:
    """Return the canonical JSON of `obj`.

    Tuples are written as lists. Integers and floats stay apart (`1` and `1.0` differ).

    Args:
        obj: Dicts with string keys, lists, tuples, strings, integers, finite floats, booleans, None; nested.

    Raises:
        UnstableValueError: For anything else, naming the key path and the type found.
    """
    _check(obj, "$", ())
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def sha256_json(obj: Any) -> str:
    """Return the sha256, in hex, of `canonical_json`."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def without_volatile(manifest: Any) -> Any:
    """Return a copy of `manifest` without the keys of `VOLATILE_KEYS`, at any depth.

    This is what a manifest's hash is taken over wherever that hash is an input of something else: two
    builds of the same data on two days, machines or checkouts have the same one.
    """
    if isinstance(manifest, dict):
        return {key: without_volatile(value) for key, value in manifest.items() if key not in VOLATILE_KEYS}
    if isinstance(manifest, list | tuple):
        return [without_volatile(value) for value in manifest]
    return manifest


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
