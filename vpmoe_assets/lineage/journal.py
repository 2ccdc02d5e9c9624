"""What one verification has read, so that one which is interrupted goes on; it ends with it.

No cache: it knows only what this verification, or the interrupted one that it goes on with, has read itself.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.hashcache import HashCache

_WORK = ".work"
_LIFETIME_S = 86400.0
"""How long an interrupted verification may be gone on with: what it read is no news after a day."""
_FILES = 64
"""Files between two entries: what an interruption loses at most."""


class Journal:
    """Callable like `hash_files`; reads each file once in a verification, be it in two goes.

    Args:
        path: Of its database.
    """

    def __init__(self, path: Path) -> None:
        self._cache = HashCache(path)
        self.begun = ""
        """When the verification that is gone on with last read anything; empty for a new one."""

    def __call__(self, files: Sequence[Path]) -> list[str]:
        """Return the sha256 of each file, in hex."""
        found: list[str] = []
        for start in range(0, len(files), _FILES):
            found += self._cache(files[start : start + _FILES])
        return found

    def close(self) -> None:
        """Close the database."""
        self._cache.close()

    @classmethod
    @contextmanager
    def of(cls, root: Path, scope: Iterable[str], *, restart: bool) -> Iterator[Self]:
        """Go on with the interrupted verification of the same things, or begin one; it is over at the end.

        Args:
            root: Of the store.
            scope: What is verified.
            restart: Begin in any case.

        Raises:
            BusyError: The same is being verified by another process.
        """
        named = hashlib.sha256("\n".join(scope).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        path = root / _WORK / f"verifying-{named}.sqlite"
        lock = root / _WORK / ".locks" / f"verifying-{named}.lock"
        if not root.is_dir():  # a question leaves nothing behind where there is no store
            yield cls(path)
            return
        with locks.hold(lock, "a verification of the same artifacts", 0.0):
            last = path.stat().st_mtime if path.is_file() else 0.0
            if restart or time.time() - last > _LIFETIME_S:
                path.unlink(missing_ok=True)
                last = 0.0
            journal = cls(path)
            if last:
                journal.begun = f"it last read at {time.strftime('%H:%M', time.localtime(last))}"
            yield journal
            journal.close()
            path.unlink(missing_ok=True)
