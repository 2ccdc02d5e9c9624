"""The latest versions of an experiment's assets, each looked up and read once."""

from collections.abc import Callable, Sequence
from functools import cached_property

from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.heads import Damaged, Head, newest
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

Scan = Callable[[str], tuple[Sequence[Head], Sequence[Damaged]]]
Read = Callable[[Head], Record]


class Latest:
    """What an experiment's assets are at one moment.

    Args:
        store: With the artifacts.
        experiment: Name.
        scan: Returns all versions of an asset, oldest first, and those that cannot be read; asks the store
            by default.
        read: Returns the whole record of a head; reads it from the store by default.
    """

    def __init__(
        self, store: Store, experiment: str, *, scan: Scan | None = None, read: Read | None = None
    ) -> None:
        self.store, self.experiment = store, experiment
        self._scan = scan or (lambda asset: store.scan(experiment, asset))
        self._read = read or store.record
        self._found: dict[str, tuple[Sequence[Head], Sequence[Damaged]]] = {}
        self._records: dict[str, Record] = {}

    @cached_property
    def assets(self) -> list[str]:
        """The assets that have a directory in the experiment."""
        return self.store.assets(self.experiment)

    def versions(self, asset: str) -> tuple[Sequence[Head], Sequence[Damaged]]:
        """Return all versions of an asset, oldest first, and those that cannot be read."""
        if asset not in self._found:
            self._found[asset] = self._scan(asset)
        return self._found[asset]

    def head(self, asset: str) -> Head | RecordError | None:
        """Return the latest version of an asset, None where there is none, or why that cannot be said."""
        try:
            return newest(*self.versions(asset))
        except RecordError as error:
            return error

    def record(self, head: Head) -> Record:
        """Return the whole record of a head.

        Raises:
            FileNotFoundError: It was removed meanwhile.
            RecordError: It was altered meanwhile.
        """
        if head.record_digest not in self._records:
            self._records[head.record_digest] = self._read(head)
        return self._records[head.record_digest]
