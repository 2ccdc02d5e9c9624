"""What statements say of keeping and cleaning away: which artifacts are pinned, what was removed on purpose.

A statement `collected` means the whole version, unless its body names `areas`: paths in the version's
directory, or `.objects` for what its record names by hash. Restoring a version ends what was said before.
"""

from collections.abc import Collection, Iterable

from vpmoe_assets.lineage.objects import OBJECTS_NAME
from vpmoe_assets.lineage.record import MANIFEST_NAME
from vpmoe_assets.lineage.statements import Statement

CONTENT = ("payload", MANIFEST_NAME, "run")
"""The areas of a version, beside its record."""
RESUME = "run/checkpoints"
"""Where a training's resume checkpoints lie in a version."""
OBJECTS = OBJECTS_NAME


def pinned(statements: Iterable[Statement]) -> Statement | None:
    """Return the statement by which an artifact is kept, or None where the last word is another."""
    words = [each for each in statements if each.kind in ("pinned", "unpinned")]
    return words[-1] if words and words[-1].kind == "pinned" else None


def collected_areas(statements: Iterable[Statement]) -> frozenset[str]:
    """Return what was removed on purpose and not restored since, as paths in the version's directory."""
    areas: set[str] = set()
    for each in statements:
        if each.kind == "restored":
            areas &= {OBJECTS}
        elif each.kind == "collected":
            areas |= set(each.body.get("areas", CONTENT))
    return frozenset(areas)


def covers(areas: Collection[str], path: str) -> bool:
    """Say whether a path lies in one of some areas."""
    return any(path == area or path.startswith(f"{area}/") for area in areas)


def removed_on_purpose(statements: Iterable[Statement]) -> bool:
    """Whether what was said last of the payload is that it was collected."""
    return "payload" in collected_areas(statements)
