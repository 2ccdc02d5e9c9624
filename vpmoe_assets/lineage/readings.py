"""What many small files say, each read once for each of its states.

Ten thousand statements or lines of the ledger take seconds to open, parse and check. What came of it is
remembered while the file system vouches that a file is unchanged (`vpmoe_assets.lineage.filememory`).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled


class Readings:
    """Reads files, or remembers what they said.

    Args:
        path: Of the database; None reads every file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._memory = None if path is None else FileMemory(path)

    def __call__(self, files: dict[Path, Identity], read: Callable[[Path], str | None]) -> dict[Path, str]:
        """Return what each file says.

        Args:
            files: With what they are known by, from before this call.
            read: Returns what one says; None where it says nothing that may be relied on, which is neither
                returned nor remembered.
        """
        known = {} if self._memory is None else self._memory.recall(files)
        said: dict[Path, str] = {}
        learnt: list[tuple[Path, Identity, str]] = []
        for path, status in files.items():
            text = known.get(path)
            if text is None:
                quiet = settled(status)
                if (text := read(path)) is None:
                    continue
                if quiet and self._memory is not None and _unchanged(path, status):
                    learnt.append((path, status, text))
            said[path] = text
        if self._memory is not None:
            self._memory.keep(learnt)
        return said


def files_below(directory: Path, depth: int, suffix: str = "") -> Iterator[tuple[Path, Identity]]:
    """Yield the files so many levels below a directory, and what each is known by; not in order.

    Args:
        directory: May not be there.
        depth: 0 for those in it.
        suffix: Of their names.
    """
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if depth and entry.is_dir():
                    yield from files_below(Path(entry.path), depth - 1, suffix)
                elif not depth and entry.name.endswith(suffix) and not entry.name.startswith("."):
                    yield Path(entry.path), identity(os.stat(entry.path))
    except (FileNotFoundError, NotADirectoryError):
        return


def _unchanged(path: Path, status: Identity) -> bool:
    try:
        return identity(path.stat()) == status
    except OSError:
        return False
