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

from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.heads import Damaged, Head
from vpmoe_assets.lineage.layout import Versioned, directories, version_name
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.store import Store

_SETTLED_NS = 2_000_000_000
"""A directory that changed this recently may change again within one tick of its clock, unseen."""
_RECORDS = 64
"""Whole records that are remembered."""


@dataclass(frozen=True)
class Asset:
    """All versions of an asset.

    Attributes:
        heads: Of the readable ones, oldest first.
        damaged: Those whose record cannot be read.
    """

    experiment: str
    name: str
    heads: tuple[Head, ...]
    damaged: tuple[Damaged, ...]

    @property
    def latest(self) -> Head | None:
        """The newest readable version."""
        return self.heads[-1] if self.heads else None


@dataclass(frozen=True)
class View:
    """What a store held at one moment.

    Attributes:
        assets: Of each experiment, by name.
    """

    assets: Mapping[str, Mapping[str, Asset]]

    @property
    def heads(self) -> Iterator[Head]:
        """Every readable version."""
        for experiment in self.assets.values():
            for asset in experiment.values():
                yield from asset.heads

    def latest(self, experiment: str) -> dict[str, Head]:
        """Return the latest version of every asset of an experiment, by name."""
        found = ((name, asset.latest) for name, asset in self.assets.get(experiment, {}).items())
        return {name: head for name, head in found if head is not None}

    def head(self, experiment: str, asset: str, version: str) -> Head | None:
        """Return one version, or None."""
        return self._by_name.get((experiment, asset, version))

    def parents(self, head: Head) -> list[tuple[InputRef, Head | None]]:
        """Return what an artifact was made from; None where that is gone, or is another one now."""
        return [(reference, self._input(head, reference)) for reference in head.inputs]

    def children(self, head: Versioned) -> list[Head]:
        """Return what was made from an artifact, oldest first."""
        return self._children.get(version_name(head), [])

    def is_latest(self, head: Versioned) -> bool:
        """Whether no newer version of the asset is there."""
        latest = self.assets[head.experiment][head.asset].latest
        return latest is not None and latest.version == head.version

    def _input(self, head: Head, reference: InputRef) -> Head | None:
        found = self.head(head.experiment, reference.asset, reference.version)
        return found if found is not None and found.record_digest == reference.record_digest else None

    @cached_property
    def _by_name(self) -> dict[tuple[str, str, str], Head]:
        return {(head.experiment, head.asset, head.version): head for head in self.heads}

    @cached_property
    def _children(self) -> dict[str, list[Head]]:
        children: dict[str, list[Head]] = {}
        for head in self.heads:
            for parent in {version_name(found) for _, found in self.parents(head) if found is not None}:
                children.setdefault(parent, []).append(head)
        for made in children.values():
            made.sort(key=lambda head: head.published_utc)
        return children


@dataclass
class Catalog:
    """The views of a store, one for each state of its directories; safe among threads."""

    store: Store
    _known: dict[tuple[str, str], tuple[int, Asset]] = field(default_factory=dict)
    _records: dict[str, Record] = field(default_factory=dict)
    _view: View = field(default_factory=lambda: View({}))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def view(self) -> View:
        """Return what the store holds now."""
        with self._lock:
            assets: dict[str, dict[str, Asset]] = {}
            changed = False
            for experiment in self.store.experiments():
                assets[experiment] = {}
                for name in directories(self.store.root / experiment):
                    asset, new = self._asset(experiment, name)
                    if asset.heads or asset.damaged:
                        assets[experiment][name] = asset
                    changed |= new
            if changed or {e: a.keys() for e, a in assets.items()} != {
                e: a.keys() for e, a in self._view.assets.items()
            }:
                self._view = View(assets)
            return self._view

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

    def _asset(self, experiment: str, name: str) -> tuple[Asset, bool]:
        """Return an asset, and whether it may differ from what was known of it."""
        try:
            changed = os.stat(self.store.root / experiment / name).st_mtime_ns
        except FileNotFoundError:
            return Asset(experiment, name, (), ()), True
        known = self._known.get((experiment, name))
        if known is not None and known[0] == changed and not known[1].damaged:
            return known[1], False
        settled = time.time_ns() - changed > _SETTLED_NS
        try:
            heads, damaged = self.store.scan(experiment, name)
        except LineageError:  # a directory that is no name of an asset
            return Asset(experiment, name, (), ()), False
        asset = Asset(experiment, name, tuple(heads), tuple(damaged))
        if known is not None and known[1] == asset:
            asset = known[1]
        if settled:
            self._known[experiment, name] = changed, asset
        return asset, known is None or asset is not known[1]
