"""Who remembers which records there were: the index, the ledger, statements, and whoever else is asked.

A record can be rewritten with digests that agree, and a version removed without a trace of its own. Nothing
that is made from it notices where nothing is. So what was known before is compared with what is there, before
anybody renews what he knows: ask the witnesses first, look at the store afterwards.
"""

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vpmoe_assets.lineage.collected import removed_on_purpose
from vpmoe_assets.lineage.errors import (
    IndexCorruptError,
    IndexLockedError,
    LineageError,
    StatementError,
)
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.readings import Readings
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.store import Store


@dataclass(frozen=True, slots=True)
class Sighting:
    """A record as a witness knows it.

    Attributes:
        witness: Who, for a message.
        experiment: Name.
        asset: Name.
        version: Name.
        record_digest: Of the record; None where the witness does not know it.
        digest: Of its content; None where the witness does not know it.
        published: Whether the witness speaks of a version that was there for all, and not of one that was to
            be.
    """

    witness: str
    experiment: str
    asset: str
    version: str
    record_digest: str | None = None
    digest: str | None = None
    published: bool = True

    @property
    def artifact(self) -> str:
        """`experiment/asset/version`."""
        return version_name(self)


@dataclass(frozen=True, slots=True)
class Heard:
    """What witnesses in the store said of one experiment.

    Attributes:
        sightings: What they know.
        unheard: Who could not be asked.
        signed: Digests of the records about which a statement says, or may have said, that they are signed.
    """

    sightings: Sequence[Sighting]
    unheard: Sequence[Problem]
    signed: Collection[str]


def sightings(store: Store, index: Index, experiment: str, readings: Readings | None = None) -> Heard:
    """Ask index, ledger and statements about one experiment.

    Args:
        store: Where ledger and statements are.
        index: May be none, or busy.
        experiment: Name.
        readings: Remembers what their files say; by default each is read.
    """
    signed: set[str] = set()
    found: list[Sighting] = []
    unheard: list[Problem] = []
    try:
        rows = index.query(
            "SELECT asset, version, record_digest, digest FROM artifacts WHERE experiment = ?", (experiment,)
        ).rows
        found += [
            Sighting("the index", experiment, asset, version, record_digest, digest)
            for asset, version, record_digest, digest in rows
        ]
    except (IndexCorruptError, IndexLockedError) as error:
        message = f"what the index knew was not compared: {error}"
        unheard.append(Problem("witness", experiment, index.path.name, message, "note"))
    found += [
        Sighting("the ledger", experiment, entry.asset, entry.version, entry.record_digest, published=False)
        for entry in store.ledger.entries(readings)
        if entry.experiment == experiment
    ]

    def altered(asset: str, digest: str, error: StatementError) -> None:
        signed.add(digest)
        unheard.append(Problem("statement", f"{experiment}/{asset}", digest, str(error)))

    for said in store.statements.summaries(experiment, readings or Readings(), altered):
        found.append(Sighting("a statement", experiment, said.asset, said.version, said.record_digest))
        if "signed" in said.kinds:
            signed.add(said.record_digest)
    return Heard(found, unheard, signed)


def contradictions(
    store: Store, seen: Iterable[Sighting], heads: Iterable[Head], unreadable: Container[str] = ()
) -> Iterator[Problem]:
    """Yield what witnesses know otherwise: records that were rewritten, and versions that are gone.

    Args:
        store: Where the records are.
        seen: By the witnesses.
        heads: What is there, looked at after the witnesses were asked: what was published or judged in
            between contradicts nobody.
        unreadable: Versions (`experiment/asset/version`) that are there, and reported as unreadable.
    """
    there = {version_name(head): head for head in heads}
    by_artifact: dict[str, list[Sighting]] = {}
    for sighting in seen:
        by_artifact.setdefault(sighting.artifact, []).append(sighting)
    for artifact, told in sorted(by_artifact.items()):
        if artifact in unreadable:
            continue
        first = told[0]
        if (head := there.get(artifact)) is not None:
            yield from _rewritten(artifact, head, told)
        elif any(sighting.published for sighting in told) and not _collected(store, told):
            message = (
                f"no longer in the store, but {_names(told)} of it; materialise it again, or state by "
                f"`vpmoe forget {first.asset}@{first.version}` that it was removed on purpose"
            )
            yield Problem("vanished", artifact, RECORD_NAME, message)


def _rewritten(artifact: str, head: Head, told: list[Sighting]) -> Iterator[Problem]:
    for what, actual in (("record_digest", head.record_digest), ("digest", head.digest)):
        others: dict[str, list[Sighting]] = {}
        for sighting in told:
            known = getattr(sighting, what)
            if known is not None and known != actual:
                others.setdefault(known, []).append(sighting)
        for known, sayings in sorted(others.items()):
            message = f"rewritten: its {what.replace('_', ' ')} is {actual}, but {_names(sayings)} of {known}"
            yield Problem("rewritten", artifact, RECORD_NAME, message)
        if others:
            return


def _collected(store: Store, told: list[Sighting]) -> bool:
    for sighting in told:
        if sighting.record_digest is None:
            continue
        try:
            said = store.statements.about_digest(sighting.experiment, sighting.asset, sighting.record_digest)
        except LineageError:
            continue
        if removed_on_purpose(said):
            return True
    return False


def _names(told: Iterable[Sighting]) -> str:
    names = sorted({sighting.witness for sighting in told})
    return f"{' and '.join(names)} know{'s' * (len(names) == 1)}"
