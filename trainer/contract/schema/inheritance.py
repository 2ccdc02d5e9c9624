"""What a table of an experiment's file inherits from another, and where a value was written."""

from collections.abc import Collection, Mapping
from typing import Any

from trainer.contract.schema.explain import Path as KeyPath

EXTENDS = "extends"
"""Top-level key of a file that states only what differs from another experiment."""
_OWN = ("name",)
"""Keys that no experiment takes from another."""
_VARIANT = "kind"
"""Key of a table that says which other keys it has."""


def extend(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of an experiment over those of the one that it extends.

    Tables are merged key by key, all other values replaced, lists too. A table of another `kind` than in the
    base replaces that one whole: its keys are others.

    Args:
        base: Of the experiment that is extended.
        over: Of the file that extends it.
    """
    own = {key: value for key, value in base.items() if key not in _OWN}
    given = {key: value for key, value in over.items() if key != EXTENDS}
    return dict(_merge(own, given, variants=True))


def inherit(
    raw: dict[str, Any], without_geometry: Collection[str], without_training: Collection[str]
) -> tuple[dict[str, Any], list[tuple[KeyPath, KeyPath]]]:
    """Merge `[rungs.defaults]` into the rungs, and `[training]` into stages and healing runs.

    Args:
        raw: The file's tables.
        without_geometry: Rungs that the defaults are not for.
        without_training: Stages that are no training runs.

    Returns:
        The merged tables, and pairs (inheriting path, inherited path) for error messages.
    """
    merged = dict(raw)
    inherited: list[tuple[KeyPath, KeyPath]] = []
    training = raw.get("training")

    def with_training(table: object, *path: str) -> object:
        if not isinstance(table, Mapping) or not isinstance(training, Mapping):
            return table
        inherited.append(((*path, "training"), ("training",)))
        return {**table, "training": _merge(training, table.get("training", {}))}

    if isinstance(rungs := raw.get("rungs"), Mapping):
        defaults = rungs.get("defaults", {})
        merged["rungs"] = {}
        for name, table in rungs.items():
            if name == "defaults":
                continue
            if name not in without_geometry and isinstance(table, Mapping) and isinstance(defaults, Mapping):
                inherited.append((("rungs", name), ("rungs", "defaults")))
                table = _merge(defaults, table)
                if "healing" in table:
                    table = {**table, "healing": with_training(table["healing"], "rungs", name, "healing")}
            merged["rungs"][name] = table
    if isinstance(stages := raw.get("stages"), Mapping):
        merged["stages"] = {
            name: table if name in without_training else with_training(table, "stages", name)
            for name, table in stages.items()
        }
    return merged, inherited


def _merge(base: Mapping[str, Any], over: object, *, variants: bool = False) -> Any:
    if not isinstance(over, Mapping):
        return over
    if variants and over.get(_VARIANT, base.get(_VARIANT)) != base.get(_VARIANT):
        return over
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = (
            _merge(below, value, variants=variants)
            if isinstance(below, Mapping) and isinstance(value, Mapping)
            else value
        )
    return result


def written(key: KeyPath, raw: Mapping[str, Any], inherited: list[tuple[KeyPath, KeyPath]]) -> KeyPath:
    """Where the value at a merged key path was written: its own table, or the one it was inherited from."""
    for path, source in reversed(inherited):  # the innermost inheritance was noted last
        if key[: len(path)] == path and not _present(raw, key):
            candidate = (*source, *key[len(path) :])
            # [training] is a whole table, so what is missing from a run's copy is missing there.
            if _present(raw, candidate) or source == ("training",):
                return candidate
    return key


def _present(table: object, key: KeyPath) -> bool:
    for part in key:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True
