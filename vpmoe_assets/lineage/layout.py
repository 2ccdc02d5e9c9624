"""Where things lie in a store.

::

    artifacts/<experiment>/<asset>/<version>/
        payload/          what is hashed and delivered
        manifest.json     where the format has one
        run/              logs, metrics, resume checkpoints
        .artifact.json    the record, written last

A version is `<UTC date>.<n>-<first 8 digits of the content digest>`. Beside the experiments, names that start
with a dot are the store's own: `.records` (see `vpmoe_assets.lineage.ledger`), `.statements`, `.objects`, and
`.work`, the only one that may be removed when nothing is being made.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Protocol

from trainer.contract.files import sync
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.record import RECORD_NAME, safe_name

_VERSION = re.compile(r"(\d{8})\.(\d+)-[0-9a-f]{8}")
_LOCK_WAIT_S = 60.0


class Versioned(Protocol):
    """What names a version: a record, its head, an origin."""

    @property
    def experiment(self) -> str:
        """Name."""

    @property
    def asset(self) -> str:
        """Name."""

    @property
    def version(self) -> str:
        """Name."""


def version_name(named: Versioned) -> str:
    """Return `experiment/asset/version`, by which statements, notes and messages name a version."""
    return f"{named.experiment}/{named.asset}/{named.version}"


def named_version(name: str) -> tuple[str, str, str]:
    """Return experiment, asset and version of a `version_name`."""
    experiment, asset, version = name.split("/")
    return experiment, asset, version


class Layout:
    """The paths of a store.

    Args:
        root: Directory of all artifacts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def work(self) -> Path:
        """Work areas, locks and caches."""
        return self.root / ".work"

    def asset(self, experiment: str, asset: str) -> Path:
        """Return the directory of an asset's versions."""
        return self.root / safe_name(experiment) / safe_name(asset)

    def version(self, experiment: str, asset: str, version: str) -> Path:
        """Return the directory of a version, whether it exists or not."""
        return self.asset(experiment, asset) / safe_name(version)

    def directory(self, named: Versioned) -> Path:
        """Return the directory of a version, whether it exists or not."""
        return self.version(named.experiment, named.asset, named.version)

    def record(self, named: Versioned) -> Path:
        """Return the file of a version's record, whether it exists or not."""
        return self.directory(named) / RECORD_NAME

    @property
    def collecting(self) -> Path:
        """The lock that a clean-up holds: whoever begins to make something waits for it."""
        return self.work / ".locks" / "collecting.lock"

    def asset_lock(self, experiment: str, asset: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which versions of an asset are named and put into place."""
        path = self.work / safe_name(experiment) / ".locks" / f"{safe_name(asset)}.lock"
        return locks.hold(path, f"publishing of {experiment}/{asset}", _LOCK_WAIT_S)


def directories(parent: Path) -> list[str]:
    """Return the names of the directories in a directory, sorted, without those that start with a dot."""
    try:
        with os.scandir(parent) as entries:
            return sorted(
                entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()
            )
    except FileNotFoundError:
        return []


def make_directory(directory: Path) -> None:
    """Make a directory where there is none, with its name on the disk."""
    missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def version_order(version: str) -> tuple[str, int]:
    """Return day and number of a version; what is no version's name comes before all."""
    match = _VERSION.fullmatch(version)
    return (match[1], int(match[2])) if match else ("", 0)
