"""What was read from files, remembered while the file system vouches that they are unchanged.

A value counts only while path, device, inode, size, mtime and ctime of its file are all what they were: no
program can set ctime, so every ordinary write is noticed. The database may be deleted at any time; one that
is broken, locked or unwritable is passed over, and what it would have said is read from the files.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", str, Path)
Identity = tuple[int, int, int, int, int]
"""Device, inode, size (bytes), mtime and ctime (ns)."""

_SETTLED_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of its clock, unseen."""
_SEALED_SETTLED_NS = 20_000_000
"""The same for a file that this process has just published, read-only: some ticks of the kernel's clock."""
_BUSY_S = 2.0
_AT_ONCE = 500


def identity(status: os.stat_result) -> Identity:
    """Return what a file is known by."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def settled(known: Identity, *, sealed: bool = False, at_ns: int | None = None) -> bool:
    """Whether every write from now on will change what a file is known by.

    Args:
        known: Of the file, now.
        sealed: It was published by this process.
        at_ns: Another time than now, in ns since 1970: when a look at many files began.
    """
    now = time.time_ns() if at_ns is None else at_ns
    return now - max(known[3:]) > (_SEALED_SETTLED_NS if sealed else _SETTLED_NS)


class FileMemory:
    """A text for each file, in one SQLite database; safe among threads, processes and forks.

    Args:
        path: Of the database; made when first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._process = 0

    def recall(self, files: Mapping[P, Identity]) -> dict[P, str]:
        """Return the texts of those files that are still what they were."""
        keys = {os.fsencode(path): path for path in files}
        found: dict[P, str] = {}
        if not keys or (self._database is None and not self.path.exists()):
            return found  # a question leaves nothing behind where there is no store
        with self._lock, self._forgiving():
            database = self._open()
            for chunk in _chunks(list(keys)):
                rows = database.execute(
                    "SELECT path, device, inode, size, mtime_ns, ctime_ns, value FROM remembered"
                    f" WHERE path IN ({','.join('?' * len(chunk))})",
                    chunk,
                )
                for key, *known, value in rows:
                    # Not asked for: torn, by machines that cache each other's pages on a shared file system.
                    if key in keys and files[keys[key]] == tuple(known):
                        found[keys[key]] = value
        return found

    def keep(self, values: Iterable[tuple[Path, Identity, str]]) -> None:
        """Remember the texts of files."""
        rows = [(os.fsencode(path), *known, value) for path, known, value in values]
        if not rows:
            return
        with self._lock, self._forgiving():
            database = self._open()
            with database:
                database.executemany("INSERT OR REPLACE INTO remembered VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError):
            self.close()  # locked, unwritable, or taken away under us: the next call tries again
        except sqlite3.DatabaseError:
            self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _open(self) -> sqlite3.Connection:
        if self._database is not None and self._process == os.getpid() and self.path.exists():
            return self._database
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)
        try:
            # After a power cut the worst is a broken file, and that is made anew.
            database.execute("PRAGMA synchronous=OFF")
            database.execute(
                "CREATE TABLE IF NOT EXISTS remembered (path BLOB PRIMARY KEY, device INTEGER, inode INTEGER,"
                " size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, value TEXT) WITHOUT ROWID"
            )
        except sqlite3.Error:
            database.close()
            raise
        self._database, self._process = database, os.getpid()
        return database

    def close(self) -> None:
        """Close the database; it is opened again when it is needed."""
        database, self._database = self._database, None
        if database is not None and self._process == os.getpid():
            database.close()

    def __del__(self) -> None:
        """Close what is open."""
        self.close()


def _chunks(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))
