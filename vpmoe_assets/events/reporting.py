"""A Dagster instance is told what a store holds: each version once, as an event that belongs to no run.

For a colleague's checkout on a shared store, and for an instance that was lost. What an event says is taken
from the record: data version, code version, and for each input its data version and the event by which
this instance knows it. So Dagster marks what is out of date with present code, as it does after a run; an
event with a data version alone would count as up to date for ever.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from heapq import heappop, heappush

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    DEFAULT_DATA_VERSION,
    NULL_EVENT_POINTER,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from vpmoe_assets.events.metadata import CODE_VERSION_DIGITS, finding_metadata, record_metadata
from vpmoe_assets.lineage.fingerprint import recorded_code_version
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name, version_order
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.told import VERSION_TAG

RECORDS = "records"
"""The asset that stands for all records of an experiment."""
_AT_ONCE = 500


@dataclass
class Reported:
    """What an instance was told.

    Attributes:
        versions: `experiment/asset/version` of each, in the order in which they were reported.
        known: How many it knew already.
        older: Those that are older than what it knows of their asset: an event now would put them above that.
    """

    versions: list[str] = field(default_factory=list)
    known: int = 0
    older: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What an instance knows of one asset: the event of each version."""

    events: dict[str, dg.EventLogRecord]

    @classmethod
    def of(cls, instance: dg.DagsterInstance, key: dg.AssetKey) -> "Told":
        """Return what it knows, the newest event of each version."""
        events: dict[str, dg.EventLogRecord] = {}
        cursor = None
        while True:
            page = instance.fetch_materializations(key, limit=_AT_ONCE, cursor=cursor)
            for record in page.records:
                said = record.asset_materialization
                if said is not None and (version := (said.tags or {}).get(VERSION_TAG)) is not None:
                    events.setdefault(version, record)
            if not page.has_more:
                return cls(events)
            cursor = page.cursor


def unreported(instance: dg.DagsterInstance, store: Store, experiment: str) -> list[Head]:
    """Return those latest versions of an experiment's assets that an instance does not know as such."""
    found = []
    for asset in store.assets(experiment):
        heads, _ = store.scan(experiment, asset)
        if not heads:
            continue
        page = instance.fetch_materializations(dg.AssetKey([experiment, asset]), limit=1)
        said = page.records[0].asset_materialization if page.records else None
        if said is None or (said.tags or {}).get(VERSION_TAG) != heads[-1].version:
            found.append(heads[-1])
    return found


def report_store(
    instance: dg.DagsterInstance,
    store: Store,
    experiment: str,
    optional: Mapping[str, Collection[str]] | None = None,
) -> Reported:
    """Tell an instance every version of an experiment that it does not know, inputs first.

    Again tells it nothing. Versions that are older than what it knows of their asset are left out.

    Args:
        instance: That is told.
        store: With the versions.
        experiment: Name.
        optional: Of each asset, the inputs that it uses only if they were ever published. A record that does
            not name one was made without it, and a run says that too: else it would be a new dependency.

    Raises:
        graphlib.CycleError: Records name each other in a circle: they are forged.
    """
    reported, told = Reported(), dict[str, Told]()
    newest: Record | None = None
    for head in in_order(store.heads(experiment)):
        key = dg.AssetKey([experiment, head.asset])
        if head.asset not in told:
            told[head.asset] = Told.of(instance, key)
        events = told[head.asset].events
        if head.version in events:
            reported.known += 1
            continue
        if any(version_order(version) > version_order(head.version) for version in events):
            reported.older.append(version_name(head))
            continue
        record = store.record(head)
        absent = set((optional or {}).get(head.asset, ())) - {reference.asset for reference in record.inputs}
        events[head.version] = _report(instance, store, record, key, told, absent)
        reported.versions.append(version_name(head))
        newest = record
    if newest is not None:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                dg.AssetKey([experiment, RECORDS]),
                description=version_name(newest),
                tags={DATA_VERSION_TAG: newest.record_digest},
            )
        )
    return reported


def in_order(heads: Iterable[Head]) -> Iterator[Head]:
    """Yield versions so that inputs come before what is made of them, and each asset's in their sequence."""
    by_digest = {head.record_digest: head for head in heads}
    before: dict[str, set[str]] = {}
    earlier: dict[str, str] = {}
    for head in sorted(by_digest.values(), key=lambda head: head.sequence):
        before[head.record_digest] = {ref.record_digest for ref in head.inputs} & by_digest.keys()
        if head.asset in earlier:
            before[head.record_digest].add(earlier[head.asset])
        earlier[head.asset] = head.record_digest
    sorter = TopologicalSorter(before)
    sorter.prepare()
    ready: list[tuple[str, str]] = []
    while sorter.is_active():
        for digest in sorter.get_ready():
            heappush(ready, (by_digest[digest].published_utc, digest))
        _, digest = heappop(ready)
        yield by_digest[digest]
        sorter.done(digest)


def _report(
    instance: dg.DagsterInstance,
    store: Store,
    record: Record,
    key: dg.AssetKey,
    told: dict[str, Told],
    absent: Collection[str],
) -> dg.EventLogRecord:
    tags = {
        VERSION_TAG: record.version,
        "vpmoe/reported": "true",
        DATA_VERSION_TAG: record.digest,
        DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
        CODE_VERSION_TAG: recorded_code_version(record.fingerprint_payload)[:CODE_VERSION_DIGITS],
    }
    for reference in record.inputs:
        input_key = dg.AssetKey([record.experiment, reference.asset])
        known = told.get(reference.asset)
        event = None if known is None else known.events.get(reference.version)
        tags[get_input_data_version_tag(input_key)] = reference.digest
        tags[get_input_event_pointer_tag(input_key)] = (
            NULL_EVENT_POINTER if event is None else str(event.storage_id)
        )
    for name in sorted(absent):
        input_key = dg.AssetKey([record.experiment, name])
        tags[get_input_data_version_tag(input_key)] = DEFAULT_DATA_VERSION.value
        tags[get_input_event_pointer_tag(input_key)] = NULL_EVENT_POINTER
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            key,
            description=f"reported from the store; made {record.published_utc}",
            metadata=record_metadata(record, store.directory(record), store, reused=True),
            tags=tags,
        )
    )
    event = instance.fetch_materializations(key, limit=1).records[0]
    for finding in store.findings(record):
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key,
                check_name=finding.check,
                passed=finding.outcome == "passed" or finding.waived_by is not None,
                metadata=finding_metadata(finding),
                target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
                    storage_id=event.storage_id, run_id=event.run_id, timestamp=event.timestamp
                ),
                severity=dg.AssetCheckSeverity(finding.severity),
                description=finding.reason or None,
                blocking=finding.blocking,
            )
        )
    return event
