"""Dagster's events of records, against the records and against each other.

A materialisation is kept in more than one place: in the log of its run, in the index over all runs, and the
newest of an asset with the asset. All of them are copies of what a record says. One that was altered or taken
out in one place is told by the others, and one that was altered everywhere by the record.
"""

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
)
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._serdes import serialize_value

from vpmoe_assets.events.metadata import CODE_VERSION_DIGITS
from vpmoe_assets.events.reporting import RECORDS
from vpmoe_assets.lineage.fingerprint import recorded_code_version
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import named_version, version_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.witnesses import Sighting
from vpmoe_assets.resources.told import VERSION_TAG

PLACE = "DAGSTER_HOME"
"""What a problem with Dagster's events calls the place where they are."""
_AT_ONCE = 500
_READ = {dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_WIPED}
_MOST_NAMED = 3
_UNDER_WAY_S = 5.0
"""How long an event may be on its way from the log of its run to the index, in seconds."""
_NO_RUN = ""
"""What Dagster calls the run of events outside of runs."""
_INDEX = "the index over all runs"
_REMEDY = "`vpmoe report-events` tells Dagster what it does not know"
_DATA = f"tag {DATA_VERSION_TAG}"
_CODE_VERSION = f"tag {CODE_VERSION_TAG}"
_REPORTED = "tag vpmoe/reported"
_RECORD = "metadata record_digest"
_REUSED = "metadata reused"
_NUMBERS = (dg.IntMetadataValue, dg.FloatMetadataValue, dg.BoolMetadataValue)


@dataclass(frozen=True)
class Event:
    """One copy of one materialisation.

    Attributes:
        where: It was read, for a message.
        run: Id of its run; empty for one that was reported outside of runs.
        timestamp: Seconds since 1970.
        said: What it says: its tags and its metadata.
    """

    where: str
    run: str
    timestamp: float
    said: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, float]:
        """By which its copies are known."""
        return self.run, self.timestamp


@dataclass
class _Asset:
    """What an instance knows of one asset.

    Attributes:
        indexed: Events of each version in the index over all runs, newest first.
        logged: In the logs of runs.
        newest: Version and event that are kept with the asset itself.
        last: Version and key of the newest event in the index.
        wiped: When its history was wiped last, seconds since 1970.
    """

    indexed: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    logged: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    newest: tuple[str, Event] | None = None
    last: tuple[str, tuple[str, float]] | None = None
    wiped: float = 0.0

    def copies(self) -> Iterator[tuple[str, Event]]:
        """Yield every copy of every event, with its version."""
        for place in (self.indexed, self.logged):
            yield from ((version, event) for version, events in place.items() for event in events)
        if self.newest is not None:
            yield self.newest


class EventAudit:
    """Callable with a record; yields what Dagster's events say otherwise, or no longer say.

    Everything is read when it is made: the instance may be closed then.

    Args:
        instance: Of Dagster.
        experiments: Names.
    """

    def __init__(self, instance: dg.DagsterInstance, experiments: Iterable[str]) -> None:
        self._until = time.time() - _UNDER_WAY_S
        self._assets: dict[tuple[str, str], _Asset] = defaultdict(_Asset)
        self._written: list[Sighting] = []
        self._unknown: dict[str, list[str]] = defaultdict(list)
        self._runs = {each.dagster_run.run_id: each.dagster_run.status for each in instance.get_run_records()}
        self._logs: set[str] = set()
        """Runs with a log of their own, be it lost."""
        wanted = set(experiments)
        log = instance.event_log_storage
        if isinstance(log, SqliteEventLogStorage):
            # Asked for a log that is not there, it would make one.
            there = {run for run in (*self._runs, _NO_RUN) if os.path.exists(log.path_for_shard(run))}
            for run in sorted(there):
                self._read_log(instance, run, wanted)
            self._logs = there | self._runs.keys()
        for name in sorted(wanted):
            self._read_index(instance, name)

    def sightings(self, experiment: str) -> list[Sighting]:
        """Return the records of an experiment as events know them, each once."""
        found = [each for each in self._written if each.experiment == experiment]
        for (name, asset), known in self._assets.items():
            if name == experiment:
                found += [
                    Sighting("Dagster", name, asset, version, event.said.get(_RECORD), event.said.get(_DATA))
                    for version, event in known.copies()
                ]
        return list(dict.fromkeys(found))

    def notes(self, experiment: str) -> Iterator[Problem]:
        """Yield the note of versions that were asked about, and of which it has no event with reason."""
        if names := self._unknown.get(experiment):
            named = ", ".join(name.partition("/")[2] for name in names[:_MOST_NAMED])
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            message = f"Dagster has no event of {named}{more}, which no run that it knows made; {_REMEDY}"
            yield Problem("event", experiment, PLACE, message, "note")

    def __call__(self, record: Record) -> Iterator[Problem]:
        """Compare what is said of one record."""
        name, known = version_name(record), self._assets[record.experiment, record.asset]
        said = [event for version, event in known.copies() if version == record.version]
        expected = _expected(record)
        told = (message for event in said for message in _contradicted(event, expected))
        for message in (*dict.fromkeys(told), *self._copies(known, record.version)):
            yield Problem("event", name, PLACE, message)
        if not known.indexed.get(record.version):
            yield from self._absent(name, known, record)

    def _copies(self, known: _Asset, version: str) -> Iterator[str]:
        """Compare the copies of each materialisation of a version with each other."""
        indexed = {each.key: each for each in known.indexed.get(version, ())}
        logged = {each.key: each for each in known.logged.get(version, ())}
        told_again = max((each.timestamp for each in indexed.values() if _REPORTED in each.said), default=0.0)
        for key in sorted(indexed.keys() | logged.keys(), key=lambda key: key[1]):
            one, other = indexed.get(key), logged.get(key)
            if key[1] > self._until:
                continue
            if other is None and one is not None and one.run in self._logs:
                yield f"{_INDEX} has an event of it that {_log_of(one.run)} has not"
            elif one is None and other is not None and key[1] > max(known.wiped, told_again):
                yield f"{other.where} has an event of it that {_INDEX} has not; {_REMEDY}"
            elif one is not None and other is not None and (differing := _difference(one, other)):
                yield f"{_INDEX} and {other.where} have another {differing} of it"
        if known.last is not None and known.last[0] == version and known.last[1][1] <= self._until:
            if known.newest is None or known.newest[1].key != known.last[1]:
                yield f"what Dagster keeps with the asset is not its newest event in {_INDEX}"
            elif differing := _difference(known.newest[1], indexed[known.last[1]]):
                yield f"{_INDEX} and what Dagster keeps with the asset have another {differing} of it"

    def _absent(self, name: str, known: _Asset, record: Record) -> Iterator[Problem]:
        """Say why there is no event of a version in the index."""
        run = record.dagster_run_id
        status = None if run is None else self._runs.get(run)
        if any(each.timestamp > known.wiped for each in known.logged.get(record.version, ())):
            return  # told with the copies
        if known.wiped:
            message = f"Dagster's history of {record.asset} was wiped; {_REMEDY}"
            yield Problem("event", name, PLACE, message, "note")
        elif run is None or status is None:
            self._unknown[record.experiment].append(name)
        elif status == dg.DagsterRunStatus.SUCCESS:
            message = f"run {run[:8]} made it and ended well, but Dagster has no event of it; {_REMEDY}"
            yield Problem("event", name, PLACE, message)
        else:
            message = f"Dagster has no event of it; run {run[:8]}, which made it, is {status.value.lower()}"
            yield Problem("event", name, PLACE, message, "note")

    def _read_index(self, instance: dg.DagsterInstance, experiment: str) -> None:
        # An asset that was wiped, or taken out of the list of assets, still has its events.
        keys = {dg.AssetKey(list(name)) for name in self._assets if name[0] == experiment}
        keys |= set(instance.get_asset_keys(prefix=[experiment]))
        for entry in instance.get_asset_records(list(keys)) if keys else ():
            asset = entry.asset_entry
            known = self._assets[experiment, asset.asset_key.path[-1]]
            if asset.asset_details is not None:
                known.wiped = max(known.wiped, asset.asset_details.last_wipe_timestamp or 0.0)
            if (newest := asset.last_materialization_record) is not None:
                known.newest = self._taken(newest.event_log_entry, "what Dagster keeps with the asset")
        for key in sorted(keys):
            known = self._assets[experiment, key.path[-1]]
            cursor = None
            while True:
                page = instance.fetch_materializations(key, limit=_AT_ONCE, cursor=cursor)
                for record in page.records:
                    if (taken := self._taken(record.event_log_entry, _INDEX)) is not None:
                        known.indexed[taken[0]].append(taken[1])
                        known.last = known.last or (taken[0], taken[1].key)
                if not page.has_more:
                    break
                cursor = page.cursor

    def _read_log(self, instance: dg.DagsterInstance, run: str, experiments: set[str]) -> None:
        cursor = None
        while True:
            page = instance.get_records_for_run(run, cursor, _READ, limit=_AT_ONCE)
            for record in page.records:
                event = record.event_log_entry.dagster_event
                key = None if event is None else event.asset_key
                if event is None or key is None or key.path[0] not in experiments:
                    continue
                asset = self._assets[key.path[0], key.path[-1]]
                if event.event_type == dg.DagsterEventType.ASSET_WIPED:
                    asset.wiped = max(asset.wiped, record.timestamp)
                elif (taken := self._taken(record.event_log_entry, _log_of(run))) is not None:
                    asset.logged[taken[0]].append(taken[1])
            if not page.has_more:
                return
            cursor = page.cursor

    def _taken(self, entry: dg.EventLogEntry, where: str) -> tuple[str, Event] | None:
        """Return version and event of an entry; that a record was written becomes a sighting."""
        said = entry.asset_materialization
        if said is None:
            return None
        tags = said.tags or {}
        if said.asset_key.path[-1] == RECORDS:
            with contextlib.suppress(ValueError):  # of an earlier program, which named none
                experiment, asset, written = named_version(said.description or "")
                self._written.append(
                    Sighting("Dagster", experiment, asset, written, tags.get(DATA_VERSION_TAG))
                )
            return None
        if (version := tags.get(VERSION_TAG)) is None:
            return None
        return version, Event(where, entry.run_id, entry.timestamp, _said(said))


def _log_of(run: str) -> str:
    return f"the log of run {run[:8]}" if run else "the log outside of runs"


def _contradicted(event: Event, expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an event says otherwise than the record."""
    for key, value in sorted(expected.items()):
        said = event.said.get(key)
        if said == value or (key not in event.said and key != _DATA):
            continue  # of an earlier program, which did not say it
        if key in (_DATA, _RECORD) and said is not None:
            continue  # compared as a sighting
        if key == _CODE_VERSION and event.said.get(_REUSED) is not False:
            continue  # present code, which a person accepted
        shown = key.replace("number ", "metadata ", 1)
        yield f"{event.where} has its {shown} as {_shown(said)}, not {_shown(value)}"


def _said(event: dg.AssetMaterialization) -> dict[str, Any]:
    """Return tags and metadata of an event; numbers once more as such: a plot may have a metric's name."""
    said: dict[str, Any] = {f"tag {key}": value for key, value in (event.tags or {}).items()}
    value: Any
    for key, value in event.metadata.items():
        plain = isinstance(value, (*_NUMBERS, dg.TextMetadataValue, dg.JsonMetadataValue))
        said[f"metadata {key}"] = _stable(value.value) if plain else serialize_value(value)
        if isinstance(value, _NUMBERS):
            said[f"number {key}"] = _stable(value.value)
    return said


def _expected(record: Record) -> dict[str, Any]:
    """Return what every event of a record says, however old the program that wrote it."""
    entries: Mapping[str, Any] = {
        "version": record.version,
        "size_bytes": record.size,
        "recipe": record.recipe,
        "execution": record.execution,
        "digest": record.digest,
        "record_digest": record.record_digest,
        "fingerprint": record.fingerprint,
    }
    expected = {f"metadata {key}": _stable(value) for key, value in entries.items()}
    expected |= {
        f"number {key}": _stable(value)
        for key, value in record.metrics.items()
        if isinstance(value, bool | int | float) and key not in entries
    }
    expected |= {
        f"tag {get_input_data_version_tag(dg.AssetKey([record.experiment, each.asset]))}": each.digest
        for each in record.inputs
    }
    expected[_DATA] = record.digest
    expected[_CODE_VERSION] = recorded_code_version(record.fingerprint_payload)[:CODE_VERSION_DIGITS]
    return expected


def _stable(value: Any) -> Any:
    """Return a value that equals itself, as JSON has it; what JSON has not as its text."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    return json.dumps(value, sort_keys=True, default=str)


def _difference(one: Event, other: Event) -> str | None:
    for key in sorted(one.said.keys() | other.said.keys()):
        if one.said.get(key) != other.said.get(key):
            return key
    return None


def _shown(value: object) -> str:
    text = str(value)
    return f"{text[:60]}…" if len(text) > 60 else text
