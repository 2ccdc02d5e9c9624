"""Which version comes next: counted for ever, so that a name is never given twice.

One small file an asset, in the ledger: the last sequence number, day and number, and what the asset's
directory was known by when the last version had been put there. While that is so, naming a version looks at
no other. After a change by hand (a version removed, one copied in from elsewhere) and in a store from before
there were counters, the versions that are there are counted too.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_bytes
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.headcache import Heads
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import Layout, directories, make_directory, version_order
from vpmoe_assets.lineage.ledger import DIRECTORY


@dataclass(frozen=True, slots=True)
class _Count:
    sequence: int = 0
    day: str = ""
    number: int = 0
    directory: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Allotment:
    """The name of the next version, less its digest.

    Attributes:
        day: UTC, `YYYYMMDD`.
        number: Within the day.
        sequence: Of the asset's versions; the highest is the latest.
        time: ISO 8601 with milliseconds and offset.
    """

    day: str
    number: int
    sequence: int
    time: str


class Counters:
    """The counters of a store; every call is made under the asset's lock.

    Args:
        layout: Of the store.
        heads: Of its records.
    """

    def __init__(self, layout: Layout, heads: Heads) -> None:
        self._layout = layout
        self._heads = heads

    def allot(self, experiment: str, asset: str) -> Allotment:
        """Return the next version; it is given to nobody else, whatever becomes of it."""
        path = self._path(experiment, asset)
        count = _read(path)
        parent = self._layout.asset(experiment, asset)
        if count.directory is None or count.directory != _known_by(parent):
            count = self._recounted(count, experiment, asset)
        now = datetime.now(UTC)
        day = max(f"{now:%Y%m%d}", count.day)  # a clock that was set back makes no earlier names
        number = count.number + 1 if day == count.day else 1
        make_directory(path.parent)
        _write(path, _Count(count.sequence + 1, day, number), durable=True)
        return Allotment(day, number, count.sequence + 1, now.isoformat(timespec="milliseconds"))

    def settle(self, experiment: str, asset: str) -> None:
        """Take what the asset's directory is now for the work of this store."""
        path = self._path(experiment, asset)
        count = _read(path)
        if count.sequence:
            known = _known_by(self._layout.asset(experiment, asset))
            _write(path, _Count(count.sequence, count.day, count.number, known), durable=False)

    def _recounted(self, count: _Count, experiment: str, asset: str) -> _Count:
        names = directories(self._layout.asset(experiment, asset))
        heads, _ = self._heads.of_asset(experiment, asset)
        day, number = max([(count.day, count.number), *map(version_order, names)])
        return _Count(max([count.sequence, len(names), *_sequences(heads)]), day, number)

    def _path(self, experiment: str, asset: str) -> Path:
        return self._layout.root / DIRECTORY / "counters" / experiment / f"{asset}.json"


def _sequences(heads: Iterable[Head]) -> list[int]:
    return [head.sequence for head in heads]


def _known_by(directory: Path) -> tuple[int, int, int] | None:
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read(path: Path) -> _Count:
    try:
        fields: dict[str, Any] = parse_json(path.read_bytes())
        known = fields.pop("directory")
        return _Count(**fields, directory=tuple(known) if known else None)
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none yet, or empty after a power cut
        return _Count()


def _write(path: Path, count: _Count, *, durable: bool) -> None:
    replace_bytes(path, json.dumps(asdict(count)).encode("ascii"), durable=durable)
