"""The reasons for a state, to the root: which function changed, and why an input has other content."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vpmoe_assets.codebase.definitions import changed_definitions
from vpmoe_assets.codebase.snapshot import SnapshotError, unpack
from vpmoe_assets.codebase.syntax import SourceError
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.difference import Difference
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.staleness import ABOVE, Cause, Standing, difference_causes, unfolded
from vpmoe_assets.lineage.store import Store


@dataclass
class Reasons:
    """The causes of one experiment's states, to their roots.

    Attributes:
        store: With the artifacts, and the sources that they were made with.
        found: From `standings`.
        tree: The present sources.
    """

    store: Store
    found: Mapping[str, Standing]
    tree: SourceTree
    _unpacked: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    _definitions: dict[tuple[str, bytes, bytes], tuple[str, ...]] = field(default_factory=dict)

    def of(self, asset: str) -> tuple[Cause, ...]:
        """Return the causes of an asset's state, each with what it follows from, where that is first met."""
        reached = {asset}
        waiting = [asset]
        while waiting:
            for cause in self.found[waiting.pop()].causes:
                if cause.kind in ABOVE and cause.name in self.found and cause.name not in reached:
                    reached.add(cause.name)
                    waiting.append(cause.name)
        return unfolded({name: self._explained(self.found[name]) for name in reached}, asset)

    def _explained(self, standing: Standing) -> Standing:
        record = standing.record
        if record is None:
            return standing
        sources = self._sources(record)
        used = {reference.role: reference for reference in record.inputs}
        causes: list[Cause] = []
        for cause in standing.causes:
            now = self.found.get(cause.name)
            if cause.kind == "code":
                cause = self._named(cause, sources, self.tree.content)
            elif cause.kind == "input" and now is not None and now.record is not None:
                between = self._between(record.experiment, used[cause.name], now.record, set())
                cause = replace(cause, causes=between)
            causes.append(cause)
        return replace(standing, causes=tuple(causes))

    def _between(self, experiment: str, used: InputRef, now: Record, seen: set[str]) -> tuple[Cause, ...]:
        """Return what made another version of an input out of the one that was used."""
        head = self.store.head(experiment, used)
        if head is None or used.record_digest in seen:
            return ()
        seen.add(used.record_digest)
        try:
            then = self.store.record(head)
        except (LineageError, FileNotFoundError):
            return ()
        old, new = self._sources(then), self._sources(now)
        difference = Difference.between(then.fingerprint_payload, now.fingerprint_payload)
        causes = [
            self._named(cause, old, new) if cause.kind == "code" else cause
            for cause in difference_causes(difference)
        ]
        present = {reference.role: reference for reference in now.inputs}
        for reference in then.inputs:
            other = present.get(reference.role)
            if other is not None and other.digest != reference.digest:
                above = self.store.head(now.experiment, other)
                below = (
                    ()
                    if above is None
                    else self._between(experiment, reference, self.store.record(above), seen)
                )
                causes.append(Cause("input", reference.role, reference.version, other.version, causes=below))
        return tuple(causes)

    def _sources(self, record: Record) -> Mapping[str, bytes]:
        """Return the sources that a record was made with; none where they are not kept, or damaged."""
        snapshot = record.objects.sources
        if snapshot is None:
            return {}
        if snapshot not in self._unpacked:
            try:
                self._unpacked[snapshot] = unpack(ObjectStore(self.store.root).get(snapshot))
            except (LineageError, SnapshotError):
                self._unpacked[snapshot] = {}
        return self._unpacked[snapshot]

    def _named(self, cause: Cause, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> Cause:
        """Return changed code with the functions that changed, where both states of its file are at hand."""
        path = cause.name
        if not path.endswith(".py") or path not in old or path not in new:
            return cause
        key = (path, old[path], new[path])
        if key not in self._definitions:
            try:
                self._definitions[key] = changed_definitions(old[path], new[path], path)
            except SourceError:
                self._definitions[key] = ()
        return replace(cause, definitions=self._definitions[key])
