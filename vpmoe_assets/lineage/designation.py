"""What a person means by a word: an artifact, a record, a Dagster run, or a whole experiment."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vpmoe_assets.lineage.errors import ArtifactMissing, ComparisonError, RecordError
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.store import Store

_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_RUN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Group:
    """Several artifacts under one name.

    Attributes:
        what: `run` or `experiment`.
        name: Id of the run, or name of the experiment.
        records: Of the run: what it made; of the experiment: the latest version of each asset. By asset.
    """

    what: str
    name: str
    records: dict[str, Record]


def designated(store: Store, text: str, experiment: str) -> Record | Group:
    """Return what a word stands for.

    Tried in this order: `EXPERIMENT/ASSET[@VERSION]` and `ASSET[@VERSION]` of the experiment in force; the
    name of an experiment; the id of a Dagster run; eight or more first digits of a record digest.

    Args:
        store: Where to look.
        text: The word.
        experiment: In force.

    Raises:
        ArtifactMissing: Nothing has that name; says what there is.
        ComparisonError: Several records begin with these digits.
    """
    name, _, version = text.partition("@")
    place, _, asset = name.rpartition("/")
    place = place or experiment
    if "/" in text or "@" in text or asset in store.assets(experiment):
        record = store.find(place, asset, version or None)
        if record is None:
            known = store.versions(place, asset) if version else store.assets(place)
            what = f"{place}/{asset}" + (f"@{version}" if version else "")
            raise ArtifactMissing(f"{what} is not in {store.root}; there is: {', '.join(known) or 'none'}")
        return record
    if text in store.experiments():
        return Group("experiment", text, {each.asset: each for each in _latest(store, text)})
    if _RUN.fullmatch(text):
        made = sorted(_holding(store, text), key=lambda record: record.sequence)
        found = {record.asset: record for record in made if record.dagster_run_id == text}
        if not found:
            raise ArtifactMissing(f"no record in {store.root} is of the run {text}")
        return Group("run", text, found)
    if _DIGEST.fullmatch(text):
        matching = [head for head in store.heads() if head.record_digest.startswith(text)]
        if len(matching) > 1:
            raise ComparisonError(f"{len(matching)} records begin with {text}; give more of its digits")
        if matching:
            return store.record(matching[0])
    known = store.assets(experiment)
    raise ArtifactMissing(
        f"{text} is no asset of experiment {experiment}, no experiment, run or record in {store.root}; "
        f"there is: {', '.join(known) or 'none'}"
    )


def before(store: Store, record: Record) -> Record:
    """Return the version that came before one.

    Raises:
        ArtifactMissing: It is the first.
    """
    earlier = [
        head for head in store.scan(record.experiment, record.asset)[0] if head.sequence < record.sequence
    ]
    if not earlier:
        raise ArtifactMissing(
            f"{record.experiment}/{record.asset}@{record.version} is the first version: name what to compare "
            "it with"
        )
    return store.record(earlier[-1])


def _latest(store: Store, experiment: str) -> Iterator[Record]:
    for asset in store.assets(experiment):
        head = store.latest(experiment, asset)
        if head is not None:
            yield store.record(head)


def _holding(store: Store, run: str) -> Iterator[Record]:
    """Yield the records whose files mention a run; parsing those of a large store would take seconds."""
    needle = json.dumps(run).encode()
    for head in store.heads():
        with contextlib.suppress(FileNotFoundError, RecordError):  # removed meanwhile
            if needle in (store.directory(head) / RECORD_NAME).read_bytes():
                yield store.record(head)
