"""What a manifest says of when, where and from which checkout it was made, and its copy without that."""

from typing import Any

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
