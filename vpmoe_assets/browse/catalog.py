"""What is in a store, remembered while its directories are what they were.

A version is one rename into its asset's directory, which changes the directory's time; so a page costs a look
at the directories, not at the records.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.graph import Node, Records
from vpmoe_assets.lineage.heads import Damaged, Head, Versions
from vpmoe_assets.lineage.latest import Latest
from vpmoe_assets.lineage.layout import Versioned, directories
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.store import Store

_SETTLED_NS = 2_000_000_000
"""A directory that changed this recently may change again within one tick of its clock, unseen."""
_RECORDS = 64
"""Whole records that are remembered."""
_SHARD_DIGITS = 2
"""Of the names of the ledger's directories that hold records."""


@dataclass(frozen=True)
class Asset:
    """All versions of an asset.

    Attributes:
        heads: Of the readable ones, oldest first.
        damaged: Those whose record cannot be read.
    """

    experiment: str
    name: str
    heads: Versions
    damaged: tuple[Damaged, ...]

    @property
    def latest(self) -> Head | None:
        """The newest readable version."""
        return self.heads[-1] if self.heads else None

    @cached_property
    def by_version(self) -> Mapping[str, Head]:
        """Every readable version, by its name."""
        return {head.version: head for head in self.heads}

    @cached_property
    def records(self) -> Records:
        """The records of the readable versions, and what they name."""
        return Records.of(self.heads, ())


@dataclass(frozen=True)
class View:
    """What an experiment held at one moment.

    Attributes:
        assets: By name.
        gone: Records of it that the ledger alone knows.
    """

    assets: Mapping[str, Asset]
    gone: tuple[Head, ...] = ()

    @property
    def latest(self) -> dict[str, Head]:
        """The latest version of every asset, by name."""
        found = ((name, asset.latest) for name, asset in self.assets.items())
        return {name: head for name, head in found if head is not None}

    def head(self, asset: str, version: str) -> Head | None:
        """Return one version, or None."""
        return None if (found := self.assets.get(asset)) is None else found.by_version.get(version)

    def parents(self, head: Head) -> list[tuple[InputRef, Head | None]]:
        """Return what an artifact was made from; None where that is gone, or is another one now."""
        return [(reference, self._input(reference)) for reference in head.inputs]

    def children(self, head: Head) -> list[Head]:
        """Return what was made from an artifact and is there, oldest first."""
        found = {}
        for edge in self.records.children.get(head.record_digest, ()):
            child = self.records.nodes[edge.child]
            if child.head is not None and child.state == "present":
                found[edge.child] = child.head
        return sorted(found.values(), key=lambda child: child.published_utc)

    def is_latest(self, head: Versioned) -> bool:
        """Whether no newer version of the asset is there."""
        latest = self.assets[head.asset].latest
        return latest is not None and latest.version == head.version

    @cached_property
    def records(self) -> Records:
        """All records, those that are gone too, and what they name."""
        parts = [asset.records for asset in self.assets.values()]
        if self.gone:
            parts.append(Records.of((), self.gone))
        nodes: dict[str, Node] = {}
        for part in reversed(parts):  # what is there comes before what is remembered
            nodes |= part.nodes
        return Records(nodes, [edge for part in parts for edge in part.edges])

    def _input(self, reference: InputRef) -> Head | None:
        found = self.head(reference.asset, reference.version)
        return found if found is not None and found.record_digest == reference.record_digest else None


@dataclass
class Catalog:
    """The views of a store, one for each state of its directories; safe among threads."""

    store: Store
    _known: dict[tuple[str, str], tuple[int, Asset]] = field(default_factory=dict)
    _records: dict[str, Record] = field(default_factory=dict)
    _views: dict[str, View] = field(default_factory=dict)
    _ledger: dict[str, tuple[int, frozenset[str]]] = field(default_factory=dict)
    _gone: dict[str, Head | None] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _whole: dict[str, View] = field(default_factory=dict)
    _remarks: Remarks | None = None
    _still: bool = False

    @property
    def remarks(self) -> Remarks:
        """What was said of the store's artifacts."""
        return self._remarks if self._still and self._remarks is not None else Remarks(self.store)

    @property
    def is_still(self) -> bool:
        """Whether what was seen once is not looked at again."""
        return self._still

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Keep to the first look at each experiment while the block lasts: for many pages of one moment."""
        with self._lock:
            self._views, self._whole, self._remarks, self._still = {}, {}, Remarks(self.store), True
        try:
            yield
        finally:
            self._still = False

    def experiments(self) -> dict[str, View]:
        """Return what each experiment holds that has artifacts, be it only damaged ones."""
        views = {name: self.view(name) for name in self.store.experiments()}
        return {name: view for name, view in views.items() if view.assets}

    def view(self, experiment: str) -> View:
        """Return what an experiment holds now; the same value while nothing has changed."""
        with self._lock:
            if self._still and (seen := self._views.get(experiment)) is not None:
                return seen
            assets = {}
            for name in directories(self.store.root / experiment):
                asset = self._asset(experiment, name)
                if asset.heads or asset.damaged:
                    assets[name] = asset
            known = self._views.get(experiment)
            if known is None or not _same(known.assets, assets):
                known = self._views[experiment] = View(assets)
            return known

    def whole_view(self, experiment: str) -> View:
        """Return what an experiment holds now, and what the ledger remembers of it beside."""
        with self._lock:
            if self._still and (seen := self._whole.get(experiment)) is not None:
                return seen
            view = self.view(experiment)
            gone = self._lost(experiment)
            if gone != view.gone:
                view = self._views[experiment] = View(view.assets, gone)
            self._whole[experiment] = view
            return view

    def latest(self, experiment: str) -> Latest:
        """Return the latest versions of an experiment's assets, as the view has them."""
        view = self.view(experiment)

        def scan(asset: str) -> tuple[Versions, tuple[Damaged, ...]]:
            found = view.assets.get(asset)
            return (Versions(), ()) if found is None else (found.heads, found.damaged)

        def read(head: Head) -> Record:
            return self.record(head) or self.store.record(head)

        return Latest(self.store, experiment, scan=scan, read=read)

    def record(self, head: Head) -> Record | None:
        """Return the whole record of a head, or None where it is gone or damaged by now."""
        with self._lock:
            if (known := self._records.get(head.record_digest)) is not None:
                return known
            with contextlib.suppress(FileNotFoundError, LineageError):
                record = self.store.record(head)
                while len(self._records) >= _RECORDS:
                    self._records.pop(next(iter(self._records)))
                self._records[head.record_digest] = record
                return record
        return None

    def _asset(self, experiment: str, name: str) -> Asset:
        """Return an asset: the same value while its directory has not changed."""
        try:
            changed = os.stat(self.store.root / experiment / name).st_mtime_ns
        except FileNotFoundError:
            return Asset(experiment, name, Versions(), ())
        known = self._known.get((experiment, name))
        if known is not None and known[0] == changed and not known[1].damaged:
            return known[1]
        settled = time.time_ns() - changed > _SETTLED_NS
        try:
            heads, damaged = self.store.scan(experiment, name)
        except LineageError:  # a directory that is no name of an asset
            return Asset(experiment, name, Versions(), ())
        asset = Asset(experiment, name, heads, tuple(damaged))
        if known is not None and known[1] == asset:
            asset = known[1]
        self._known[experiment, name] = (changed if settled else -1), asset
        return asset

    def _lost(self, experiment: str) -> tuple[Head, ...]:
        """Return the records of an experiment that only the ledger knows."""
        root = self.store.ledger.root
        there = {
            digest
            for name in self.store.experiments()
            for asset in self.view(name).assets.values()
            for digest in asset.heads.record_digests
        }
        for shard in directories(root):
            if len(shard) == _SHARD_DIGITS:
                self._read_shard(root / shard)
        lost = [digest for _, digests in self._ledger.values() for digest in digests - there]
        unread = [digest for digest in lost if digest not in self._gone]
        heads = self.store.remembered(unread)
        self._gone |= {digest: heads.get(digest) for digest in unread}
        known = (self._gone[digest] for digest in sorted(lost))
        return tuple(head for head in known if head is not None and head.experiment == experiment)

    def _read_shard(self, shard: Path) -> None:
        changed = os.stat(shard).st_mtime_ns
        known = self._ledger.get(shard.name)
        if known is None or known[0] != changed:
            settled = time.time_ns() - changed > _SETTLED_NS
            digests = frozenset(name.removesuffix(".json") for name in os.listdir(shard))
            self._ledger[shard.name] = (changed if settled else -1), digests


def _same(old: Mapping[str, Asset], new: Mapping[str, Asset]) -> bool:
    return old.keys() == new.keys() and all(old[name] is asset for name, asset in new.items())
