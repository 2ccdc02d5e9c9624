"""Is every file still what it was? Compare a published artifact, and all it came from, with the records."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vpmoe_assets.lineage.collected import collected_areas, covers, removed_on_purpose
from vpmoe_assets.lineage.digest import hash_files
from vpmoe_assets.lineage.errors import RecordError, StatementError
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.intact import Intact, IntactStates
from vpmoe_assets.lineage.integrity import (
    Hasher,
    Problem,
    missing_objects,
    object_problems,
    payload_problems,
    place_problems,
    run_problems,
)
from vpmoe_assets.lineage.layout import named_version, version_name
from vpmoe_assets.lineage.record import RECORD_NAME, InputRef, Record, read_record
from vpmoe_assets.lineage.signature_audit import signature_problems
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.treestate import TreeState
from vpmoe_assets.lineage.witnesses import Heard, Sighting, contradictions, sightings


@dataclass(frozen=True)
class Verification:
    """What came of verifying an experiment, or an artifact with all it came from.

    Attributes:
        heads: Of the records that were there, by asset and sequence.
        found: Problems and notes.
    """

    heads: Sequence[Head]
    found: Sequence[Problem]

    @property
    def problems(self) -> list[Problem]:
        """What is not as it was."""
        return [each for each in self.found if each.severity == "problem"]

    @property
    def notes(self) -> list[Problem]:
        """What is different and explained."""
        return [each for each in self.found if each.severity == "note"]


@dataclass(frozen=True)
class Look:
    """How closely versions are looked at.

    Attributes:
        hasher: Returns the sha256 of each file; None compares names and sizes alone.
        states: In which versions were found intact: one that is still in its state is passed over, and those
            that are found intact now are remembered. None looks at every file.
        audit: A further look at every record; then none is passed over.
        witnesses: Further ones, asked about an experiment before the store is looked at.
        key: sha256 of the public key with which every version has to be signed; None for any, or no, key.
    """

    hasher: Hasher | None = hash_files
    states: IntactStates | None = None
    audit: Callable[[Record], Iterable[Problem]] | None = None
    witnesses: Callable[[str], Iterable[Sighting]] | None = None
    key: str | None = None


_AT_ONCE = 50
"""Versions found intact that are remembered together: an interrupted run goes on from the last of them."""


def verify_experiment(store: Store, index: Index, experiment: str, look: Look = Look()) -> Verification:
    """Verify every version of an experiment, and compare with what is remembered of it; renews nothing.

    The list of versions is taken once: one that is published meanwhile is no problem.

    Args:
        store: Where it lies.
        index: Asked what it knows.
        experiment: Name.
        look: How closely; reads every byte by default.
    """
    heard = _heard(store, index, experiment, look)
    found = list(heard.unheard)
    heads: list[Head] = []
    unreadable: set[str] = set()
    for asset in store.assets(experiment):
        readable, damaged = store.scan(experiment, asset)
        heads += readable
        unreadable |= {version_name(bad) for bad in damaged}
        found += [Problem("record", version_name(bad), RECORD_NAME, str(bad.error)) for bad in damaged]
    found += _looked_at(store, heads, look)
    found += signature_problems(store, heads, look.key, every=look.audit is not None, among=heard.signed)
    found += contradictions(store, heard.sightings, heads, unreadable)
    return Verification(heads, found)


def verify_artifact(store: Store, index: Index, record: Record, look: Look = Look()) -> Verification:
    """Verify one artifact and its whole ancestry, and compare with what is remembered of them.

    Args:
        store: Where it lies.
        index: Asked what it knows.
        record: As read from the store.
        look: How closely; reads every byte by default.
    """
    heard = _heard(store, index, record.experiment, look)
    heads, unreadable = _ancestry(store, record)
    concerned = {version_name(each) for each in heads}
    concerned |= {f"{each.experiment}/{i.asset}/{i.version}" for each in heads for i in each.inputs}
    assets = {name.rpartition("/")[0] for name in concerned}
    found = _looked_at(store, heads, look)
    found += signature_problems(store, heads, look.key, every=look.audit is not None, among=heard.signed)
    found += [each for each in heard.unheard if each.kind == "witness" or each.artifact in assets]
    told = [each for each in heard.sightings if each.artifact in concerned]
    found += contradictions(store, told, heads, unreadable)
    return Verification(heads, found)


def _heard(store: Store, index: Index, experiment: str, look: Look) -> Heard:
    """Return what witnesses know of an experiment."""
    further = list(look.witnesses(experiment)) if look.witnesses else []
    trusting = look.audit is None and (look.hasher is None or look.states is not None)
    heard = sightings(store, index, experiment, store.readings if trusting else None)
    return replace(heard, sightings=[*further, *heard.sightings])


def _ancestry(store: Store, record: Record) -> tuple[list[Head], set[str]]:
    """Return the heads of an artifact and of everything it came from, and what of that is unreadable."""
    heads, unreadable = [Head.of(record)], set[str]()
    seen = {version_name(record)}
    for head in heads:  # it grows
        for reference in head.inputs:
            name = f"{head.experiment}/{reference.asset}/{reference.version}"
            if name in seen:
                continue
            seen.add(name)
            try:
                parent = store.head_of(head.experiment, reference.asset, reference.version)
            except RecordError:
                unreadable.add(name)
                continue
            if parent is not None:
                heads.append(parent)
    return heads, unreadable


def _looked_at(store: Store, heads: Sequence[Head], look: Look) -> list[Problem]:
    """Look at the files, objects and inputs of versions, each once."""
    found: list[Problem] = []
    objects: dict[str, Mapping[str, str]] = {}
    there = {version_name(head): (head.record_digest, head.digest) for head in heads}
    states = look.states if look.audit is None and look.hasher is not None else None
    places = [store.directory(head) for head in heads]
    known = {} if states is None else states.unchanged(dict(zip(places, heads, strict=True)))
    intact: list[Intact] = []
    for place, head in zip(places, heads, strict=True):
        name = version_name(head)
        if (same := known.get(place)) is not None:
            absent = [Problem("missing", name, path, message) for path, message in same.absent]
            found += _accounted(store, head, absent)
            found += _elsewhere(store, head, there)
            objects[name] = same.objects
            continue
        try:
            state = None if states is None else TreeState.of(place)
            record = store.record(head)
        except FileNotFoundError:
            found.append(Problem("missing", name, RECORD_NAME, "missing"))
            continue
        except RecordError as error:
            found.append(Problem("record", name, RECORD_NAME, str(error)))
            continue
        if look.audit is not None and Head.of(record) != head:
            message = "what is remembered of it in .work/heads.sqlite is another thing; remove that file"
            found.append(Problem("witness", name, RECORD_NAME, message))
        wrong = _wrong_files(store, record, look.hasher)
        accounted = _accounted(store, head, wrong)
        found += accounted
        found += _elsewhere(store, record, there)
        objects[name] = record.objects.model_dump(exclude_none=True)
        if look.audit is not None:
            found += look.audit(record)
        if state is not None and states is not None and all(each.severity == "note" for each in accounted):
            intact.append((place, record, state, [(each.path, each.message) for each in wrong]))
            if len(intact) == _AT_ONCE:
                states.keep(intact)
                intact = []
    if states is not None:
        states.keep(intact)
    found += _explained_objects(store, missing_objects(store.root, objects, look.hasher))
    return found


def _elsewhere(store: Store, child: Record | Head, there: Mapping[str, tuple[str, str]]) -> Iterator[Problem]:
    """Yield what is wrong with those inputs that are not what is looked at anyway.

    Args:
        store: Where it lies.
        child: What was made from them.
        there: Record digest and content digest of what is looked at, by `experiment/asset/version`.
    """
    for reference in child.inputs:
        name = f"{child.experiment}/{reference.asset}/{reference.version}"
        if there.get(name) != (reference.record_digest, reference.digest):
            yield from _parent(store, child, reference)[1]


def verify_record(
    store: Store,
    record: Record,
    *,
    hasher: Hasher | None = hash_files,
    seen: set[str] | None = None,
) -> list[Problem]:
    """Verify one artifact and its whole ancestry.

    Args:
        store: Where it lies.
        record: As read from the store, or as remembered from elsewhere (then the one on disk must equal it).
        hasher: Returns the sha256 of each file, by default by reading every byte; None compares names and
            sizes of files and the digests of records, and reads no payload.
        seen: Record digests that need no second look; pass one set to verify several artifacts together.

    Returns:
        Problems, the artifact's own first; empty when everything is what it was.
    """
    return [problem for _, found in ancestry_problems(store, record, hasher, seen) for problem in found]


def ancestry_problems(
    store: Store, record: Record, hasher: Hasher | None, seen: set[str] | None = None
) -> Iterator[tuple[Record, list[Problem]]]:
    """Yield an artifact and everything it came from, each once, with what is wrong with it."""
    seen = set() if seen is None else seen
    queue = [record]
    while queue:
        current = queue.pop(0)
        if current.record_digest in seen:
            continue
        seen.add(current.record_digest)
        problems = [
            *_record_problems(store.directory(current), current),
            *_accounted(store, current, _wrong_files(store, current, hasher)),
            *_explained_objects(store, object_problems(store.root, current, hasher)),
        ]
        for reference in current.inputs:
            parent, wrong = _parent(store, current, reference)
            problems += wrong
            if parent is not None:
                queue.append(parent)
        yield current, problems


def _wrong_files(store: Store, record: Record, hasher: Hasher | None) -> list[Problem]:
    """Return what is wrong with the files of a version."""
    directory = store.directory(record)
    return [
        *place_problems(directory, record),
        *payload_problems(directory, record, hasher),
        *run_problems(directory, record, hasher),
    ]


def _accounted(store: Store, named: Record | Head, found: Sequence[Problem]) -> list[Problem]:
    """Return what is wrong with the files of a version; what a statement says to be gone is noted."""
    if not found:
        return []
    try:
        said = store.statements.about_digest(named.experiment, named.asset, named.record_digest)
    except StatementError as error:
        return [*found, Problem("statement", version_name(named), RECORD_NAME, str(error))]
    gone = {f"run/{path}" for each in said if each.kind == "restored" for path in each.body.get("lost", ())}
    areas = collected_areas(said)
    explained = [_explained(problem, gone, areas) for problem in found if not _gone_from(areas, problem)]
    for area in sorted(areas):
        if missing := [problem for problem in found if _gone_from([area], problem)]:
            count = f"{len(missing)} file{'s' * (len(missing) > 1)}"
            explained.append(Problem("missing", version_name(named), area, f"collected: {count}", "note"))
    return explained


def _gone_from(areas: Collection[str], problem: Problem) -> bool:
    """Whether a file is missing from what a statement says to be collected."""
    return problem.kind == "missing" and covers(areas, problem.path)


def _explained_objects(store: Store, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield problems with objects; what a statement says to be collected is noted."""
    for problem in problems:
        said: Sequence[Statement] = ()
        if problem.kind == "missing":
            with contextlib.suppress(StatementError, RecordError):  # reported where they are looked at
                if head := store.head_of(*named_version(problem.artifact)):
                    said = store.statements.about_digest(head.experiment, head.asset, head.record_digest)
        yield _explained(problem, set(), collected_areas(said) if said else ())


def _explained(problem: Problem, gone: set[str], areas: Collection[str]) -> Problem:
    if problem.kind != "missing":
        return problem
    if problem.path in gone:
        message = f"{problem.message}; lost before the version was restored"
    elif covers(areas, problem.path):
        message = f"{problem.message}; collected"
    else:
        return problem
    return replace(problem, message=message, severity="note")


def _parent(store: Store, child: Record | Head, reference: InputRef) -> tuple[Record | None, list[Problem]]:
    name = version_name(child)
    place = store.version_directory(child.experiment, reference.asset, reference.version)
    made = f"made from {reference.asset}@{reference.version}"
    try:
        parent = read_record(place / RECORD_NAME)
    except FileNotFoundError:
        said = _said(store, child.experiment, reference)
        if removed_on_purpose(said):
            message = f"{made}, which was collected"
            return None, [Problem("ancestor", name, RECORD_NAME, message, "note")]
        return None, [Problem("ancestor", name, RECORD_NAME, f"{made}, which is no longer in the store")]
    except RecordError as error:
        return None, [Problem("ancestor", name, RECORD_NAME, str(error))]
    if parent.digest != reference.digest:
        message = (
            f"{made} with digest {reference.digest}, but what is there has {parent.digest} "
            f"(record digest {parent.record_digest})"
        )
        return parent, [Problem("ancestor", name, RECORD_NAME, message)]
    if parent.record_digest != reference.record_digest:
        message = (
            f"{made} under record digest {reference.record_digest}; the same content is there under "
            f"{parent.record_digest}"
        )
        return parent, [Problem("ancestor", name, RECORD_NAME, message, "note")]
    return parent, []


def _said(store: Store, experiment: str, reference: InputRef) -> Sequence[Statement]:
    try:
        return store.statements.about_digest(experiment, reference.asset, reference.record_digest)
    except StatementError:
        return ()  # reported where the statements themselves are looked at


def _record_problems(directory: Path, record: Record) -> list[Problem]:
    try:
        found = read_record(directory / RECORD_NAME).record_digest
    except FileNotFoundError:
        return [Problem("missing", version_name(record), RECORD_NAME, "missing")]
    except RecordError as error:
        return [Problem("record", version_name(record), RECORD_NAME, str(error))]
    if found != record.record_digest:
        message = f"record digest {found}, expected {record.record_digest}"
        return [Problem("record", version_name(record), RECORD_NAME, message)]
    return []
