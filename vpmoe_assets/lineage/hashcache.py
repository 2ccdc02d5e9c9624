"""Digests of large published files, remembered while the file system vouches that they are unchanged."""

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from vpmoe_assets.lineage.digest import file_sha256

SMALLEST = 8 << 20
"""Bytes below which a file is simply hashed again: that costs less than 10 ms."""

_SETTLED_S = 2.0
"""A file changed this recently is not remembered: a second change within one clock tick would go unseen."""


class HashCache:
    """Callable like `file_sha256`; answers from memory when nothing about the file has changed.

    A digest counts only while path, device, inode, size, mtime and ctime are all what they were: no program
    can set ctime, so every ordinary write is noticed. Decay of the medium is not: `vpmoe verify` always
    reads. The cache may be deleted at any time, and a broken one is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, file: Path) -> str:
        """Return the sha256 of a file, in hex."""
        before = _identity(file)
        if before[2] < SMALLEST:
            return file_sha256(file)
        try:
            return self._known(file, before) or self._learn(file, before)
        except sqlite3.Error:
            return file_sha256(file)

    def _known(self, file: Path, identity: tuple[int, ...]) -> str | None:
        with contextlib.closing(self._connect()) as database:
            row = database.execute(
                "SELECT sha256 FROM digests WHERE path=? AND device=? AND inode=? AND size=? AND mtime_ns=?"
                " AND ctime_ns=?",
                (os.fspath(file), *identity),
            ).fetchone()
        return str(row[0]) if row else None

    def _learn(self, file: Path, before: tuple[int, ...]) -> str:
        digest = file_sha256(file)
        settled = time.time_ns() - max(before[3:]) > _SETTLED_S * 1e9
        if settled and _identity(file) == before:
            with contextlib.closing(self._connect()) as database, database:
                database.execute(
                    "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (os.fspath(file), *before, digest),
                )
        return digest

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=10)
        database.execute(
            "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, device INTEGER, inode INTEGER,"
            " size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, sha256 TEXT)"
        )
        return database


def _identity(file: Path) -> tuple[int, int, int, int, int]:
    """Return device, inode, size (bytes), mtime and ctime (ns)."""
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
