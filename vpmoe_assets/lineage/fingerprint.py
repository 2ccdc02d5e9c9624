"""The recipe fingerprint: *how* an artifact is made. Same fingerprint, same bytes expected."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.project import ROOT

SCHEMA = "vpmoe.fingerprint/1"


def source_digests(paths: Iterable[Path], root: Path = ROOT) -> dict[str, str]:
    """Return `{path relative to root: sha256}` of the source files that a step's result depends on.

    Args:
        paths: Files, or directories whose `*.py` files count, all below `root`.
        root: The project.

    Raises:
        FileNotFoundError: A path does not exist, or a directory has no Python file.
        ValueError: A path lies outside `root`.
    """
    digests: dict[str, str] = {}
    for path in paths:
        absolute = path if path.is_absolute() else root / path
        files = sorted(absolute.rglob("*.py")) if absolute.is_dir() else [absolute]
        if not files:
            raise FileNotFoundError(f"no Python file below {absolute}: a step must name the code it runs")
        for file in files:
            digests[file.relative_to(root).as_posix()] = file_sha256(file)
    return dict(sorted(digests.items()))


def code_version(recipe: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return the sha256 of recipe and sources without inputs: Dagster's `code_version`."""
    return sha256_json({"schema": SCHEMA, "recipe": dict(recipe), "sources": dict(sources)})


def recipe_fingerprint(
    recipe: Mapping[str, Any], sources: Mapping[str, str], input_digests: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint and the payload it was taken over, which goes into the record.

    Args:
        recipe: Resolved identity keys of the step, JSON-able, every default written out.
        sources: From `source_digests`.
        input_digests: Content digest of each input by role (usually the asset's name).

    Raises:
        UnstableValueError: The recipe holds a value without a stable form; the message has its key path.
    """
    payload = {
        "schema": SCHEMA,
        "recipe": dict(recipe),
        "sources": dict(sources),
        "inputs": dict(input_digests),
    }
    return sha256_json(payload), payload
