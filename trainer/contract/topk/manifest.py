"""`store.json`: what the shards of a store are, deterministic to the byte."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainer.contract.canonical import UnstableValueError, canonical_json
from trainer.contract.files import replace_text
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity

SCHEMA = "vpmoe.topk/1"
MANIFEST_NAME = "store.json"
SPLITS = ("train", "valid")

_MOST_SHARDS = 1 << 31
"""Numbers beyond that are no number of a shard, nor part of a file's name."""


def write_manifest(
    root: Path,
    identity: StoreIdentity,
    shards: Mapping[str, Iterable[Mapping[str, Any]]],
    span_means: Mapping[str, float],
) -> dict[str, Any]:
    """Write `store.json`, canonical JSON, over finished shards.

    Args:
        root: Directory of the store.
        identity: Of the store.
        shards: For each split the entries that `TopKShardWriter.close` returned.
        span_means: Mean log-prob of the label by span, over the training split; the `m` of the rescored CE.

    Returns:
        The manifest.
    """
    splits: dict[str, Any] = {}
    for split in SPLITS:
        entries = sorted((dict(entry) for entry in shards.get(split, ())), key=lambda entry: entry["shard"])
        splits[split] = {
            "sequences": sum(entry["sequences"] for entry in entries),
            "tokens": sum(entry["tokens"] for entry in entries),
            "shards": entries,
        }
    manifest = {
        "schema": SCHEMA,
        **identity.document,
        "binding": identity.digest,
        "span_means": dict(span_means),
        "splits": splits,
    }
    replace_text(root / MANIFEST_NAME, canonical_json(manifest, indent=1) + "\n")
    return manifest


def identity_of(document: Mapping[str, Any], source: str) -> StoreIdentity:
    """Read an identity out of a manifest.

    Raises:
        StoreError: If a key is missing or its value impossible; `source` is named.
    """
    try:
        identity = StoreIdentity(**{field.name: document[field.name] for field in fields(StoreIdentity)})
        _ = identity.digest  # has to have one: no teacher is described by a list, or by NaN
        return identity
    except (KeyError, TypeError, ValueError, RecursionError, UnstableValueError) as error:
        raise StoreError(
            f"{source} is damaged ({type(error).__name__}: {error}); score the store again"
        ) from error


def shard_entries(manifest: Mapping[str, Any], source: str) -> list[tuple[str, int, dict[str, Any]]]:
    """Return split, number and entry of every shard.

    Raises:
        StoreError: If an entry is not one; `source` is named.
    """
    try:
        entries = [(split, dict(entry)) for split in SPLITS for entry in manifest["splits"][split]["shards"]]
        for _, entry in entries:
            for key, kind in (("shard", int), ("bytes", int), ("sha256", str)):
                if type(entry[key]) is not kind:
                    raise TypeError(f"{key} is {entry[key]!r}")
            if not 0 <= entry["shard"] < _MOST_SHARDS:
                raise ValueError(f"shard is {entry['shard']}")
        return [(split, entry["shard"], entry) for split, entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{source} is damaged ({type(error).__name__}: {error}); score the store again"
        ) from error
