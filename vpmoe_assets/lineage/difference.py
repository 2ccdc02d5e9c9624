"""How two identities of a step differ: files, keys of the recipe, packages; by name, with both values."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from trainer.contract.canonical import canonical_json

_LONGEST = 60
"""Characters of a value in a line for people."""
_BEFORE = 12
"""Of them, those shown before the first that differs."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not the same on both sides.

    Attributes:
        name: Path of a file, dotted key of the recipe, or name of a package.
        old: Digest of a file, canonical JSON of a value, or version; None where it was not there.
        new: The same of the other side.
    """

    name: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        old, new = _short(self.old), _short(self.new)
        if old == new and self.old is not None and self.new is not None:  # they part behind what is shown
            pairs = enumerate(zip(self.old, self.new, strict=False))
            apart = next((at for at, (a, b) in pairs if a != b), min(len(self.old), len(self.new)))
            start = apart - _BEFORE
            old, new = (f"…{_short(text[start:])}" for text in (self.old, self.new))
        return f"{self.name} {old} → {new}"


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two fingerprints' payloads, without their inputs.

    Attributes:
        sources: Files, by what they say.
        recipe: Values of the recipe, by dotted key; a list is one value.
        packages: Versions of packages that decide bytes.
    """

    sources: tuple[Change, ...] = ()
    recipe: tuple[Change, ...] = ()
    packages: tuple[Change, ...] = ()

    @classmethod
    def between(cls, old: Mapping[str, Any], new: Mapping[str, Any]) -> Self:
        """Return what differs between two fingerprints' payloads."""
        return cls(
            changes(old.get("sources", {}), new.get("sources", {})),
            recipe_changes(old.get("recipe", {}), new.get("recipe", {})),
            changes(old.get("packages", {}), new.get("packages", {})),
        )

    def __bool__(self) -> bool:
        return bool(self.sources or self.recipe or self.packages)

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        """Return it for people: files by name, values and versions with both sides."""
        added = [change.name for change in self.sources if change.old is None]
        removed = [change.name for change in self.sources if change.new is None]
        changed = [change.name for change in self.sources if None not in (change.old, change.new)]
        found = [
            f"code {what}: {', '.join(names)}"
            for what, names in (("changed", changed), ("added", added), ("removed", removed))
            if names
        ]
        found += [f"recipe {change}" for change in self.recipe]
        found += [f"package {change}" for change in self.packages]
        return found

    def to_json(self) -> dict[str, list[dict[str, str | None]]]:
        """Return it as plain values, for a statement."""
        return {
            kind: [{"name": c.name, "old": c.old, "new": c.new} for c in getattr(self, kind)]
            for kind in ("sources", "recipe", "packages")
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Sequence[Mapping[str, Any]]]) -> Self:
        """Return what `to_json` wrote."""
        return cls(
            **{
                kind: tuple(Change(c["name"], c["old"], c["new"]) for c in fields.get(kind, ()))
                for kind in ("sources", "recipe", "packages")
            }
        )


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Change, ...]:
    """Return what differs between two mappings, by name."""
    return tuple(
        Change(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return the values that differ between two recipes, by dotted key."""
    return changes(dict(recipe_leaves(old)), dict(recipe_leaves(new)))


def recipe_leaves(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a recipe as canonical JSON, each with its dotted key."""
    for key, value in recipe.items():
        # A key with a dot in it is quoted: two different recipes never read alike.
        name = prefix + (json.dumps(key) if "." in key or '"' in key else key)
        if isinstance(value, Mapping) and value:
            yield from recipe_leaves(value, f"{name}.")
        else:
            yield name, canonical_json(value)


def _short(value: str | None) -> str:
    if value is None:
        return "(absent)"
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"
