"""The recipe fingerprint: *how* an artifact is made. Same fingerprint, same bytes expected."""

from collections.abc import Mapping
from typing import Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.codebase.closure import Closure

SCHEMA = "vpmoe.fingerprint/2"


def code_version(recipe: Mapping[str, Any], code: Closure) -> str:
    """Return the sha256 of recipe and code without inputs: Dagster's `code_version`."""
    return sha256_json(_payload(recipe, code))


def recorded_code_version(payload: Mapping[str, Any]) -> str:
    """Return the `code_version` in a record's fingerprint payload, of whichever schema."""
    return sha256_json({key: value for key, value in payload.items() if key != "inputs"})


def recipe_fingerprint(
    recipe: Mapping[str, Any], code: Closure, input_digests: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint and the payload it was taken over, which goes into the record.

    Args:
        recipe: Resolved identity keys of the step, JSON-able, every default written out.
        code: Of the step.
        input_digests: Content digest of each input by role (usually the asset's name).

    Raises:
        UnstableValueError: The recipe holds a value without a stable form; the message has its key path.
    """
    payload = {**_payload(recipe, code), "inputs": dict(input_digests)}
    return sha256_json(payload), payload


def _payload(recipe: Mapping[str, Any], code: Closure) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "recipe": dict(recipe),
        "sources": dict(code.sources),
        "packages": dict(code.packages),
    }
