"""What has changed in a store since its index was brought up to date.

::

    artifacts/.work/index.pending/<time>-<process>-<number>      holds `experiment/asset/version`

Whoever changes what a store says of a version notes it here, before and after: a kill in between loses
nothing. Whoever brings the index up to date removes the notes that it has read, and those alone, so that
nothing needs a lock, and its cost is that of the changes, not of the store.
"""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = "index.pending"

_number = itertools.count()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """A version of which the index may not know the present state.

    Attributes:
        note: The file that says so.
        artifact: `experiment/asset/version`.
    """

    note: Path
    artifact: str

    @property
    def age_s(self) -> float:
        """Seconds since it was noted."""
        return (time.time_ns() - int(self.note.name.partition("-")[0])) / 1e9


class Changes:
    """The notes of a store.

    Args:
        root: Of the store.
    """

    def __init__(self, root: Path) -> None:
        self.directory = Path(root) / ".work" / DIRECTORY

    def note(self, artifact: str) -> None:
        """Note that a version has changed."""
        note = self.directory / f"{time.time_ns()}-{os.getpid()}-{next(_number)}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            note.write_text(artifact, encoding="ascii")
        except OSError as error:
            with contextlib.suppress(OSError):  # an empty one would be taken for one that is being written
                note.unlink()
            _log.warning("%s: not noted for the index (%s); run `vpmoe index rebuild`", artifact, error)

    @contextlib.contextmanager
    def noted(self, artifact: str) -> Iterator[None]:
        """Note that a version changes within this block; a note that cannot be written stops nobody.

        Args:
            artifact: `experiment/asset/version`.
        """
        self.note(artifact)
        try:
            yield
        finally:
            self.note(artifact)

    def pending(self) -> list[Change]:
        """Return the notes, oldest first."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        found: list[Change] = []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                artifact = (self.directory / name).read_text(encoding="ascii", errors="replace")
                if artifact.count("/") == 2:  # else it is being written
                    found.append(Change(self.directory / name, artifact))
        return found

    def settle(self, changes: Iterable[Change]) -> None:
        """Remove notes: the index knows of these changes."""
        for change in changes:
            change.note.unlink(missing_ok=True)
