"""Signatures of versions against their records, and which versions of an ancestry have none."""

from collections.abc import Container, Iterator, Sequence

from vpmoe_assets.lineage.attestation import signature_fault, signed
from vpmoe_assets.lineage.errors import RecordError, StatementError
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store

PLACE = ".statements"
"""Where a signature lies, for messages."""
_MOST_NAMED = 8


def signature_problems(
    store: Store,
    heads: Sequence[Head],
    key: str | None = None,
    *,
    every: bool = False,
    among: Container[str] | None = None,
) -> Iterator[Problem]:
    """Yield signatures that do not hold, and what is not signed.

    Args:
        store: Where they are.
        heads: Of the versions that are looked at.
        key: sha256 of the public key that has to have signed each of them; a version without is a problem.
        every: Whether to note which of them nobody signed, where somebody signed others.
        among: Digests of the records that may be signed; by default all statements are read.
    """
    objects = ObjectStore(store.root)
    keys: dict[str, set[str]] = {}
    for head in heads:
        name = version_name(head)
        try:
            found = _signed(store, head) if among is None or head.record_digest in among else []
            record = store.record(head) if found else None
        except (StatementError, RecordError, FileNotFoundError):  # reported where they are looked at
            continue
        held = keys.setdefault(name, set())
        for statement in found:
            assert record is not None
            if fault := signature_fault(objects, record, statement):
                where = f"the signature {statement.id[:12]} by {statement.author}: {fault}"
                yield Problem("signature", name, PLACE, where)
            else:
                held.add(statement.body["key"])
        if key is not None and key not in held:
            others = f"; it is signed with {', '.join(each[:12] for each in sorted(held))}" if held else ""
            yield Problem("signature", name, PLACE, f"not signed with key {key[:12]}{others}")
    if every and key is None and any(keys.values()):
        yield from _told(keys)


def _signed(store: Store, head: Head) -> list[Statement]:
    return signed(store.statements.about_digest(head.experiment, head.asset, head.record_digest))


def _told(keys: dict[str, set[str]]) -> Iterator[Problem]:
    """Yield a note on who signed how many, and which versions nobody signed."""
    first = next(iter(keys))
    without = [name for name, held in keys.items() if not held]
    for each in sorted(set().union(*keys.values())):
        count = sum(each in held for held in keys.values())
        message = f"{count} of {len(keys)} signed with key {each[:12]}"
        yield Problem("signature", first, PLACE, message, "note")
    if without:
        named = ", ".join(without[:_MOST_NAMED])
        more = f" and {len(without) - _MOST_NAMED} more" if len(without) > _MOST_NAMED else ""
        yield Problem("signature", first, PLACE, f"signed by nobody: {named}{more}", "note")
