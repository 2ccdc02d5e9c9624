"""How a file system tells one state of a directory from another: names, inodes, sizes and times, no contents.

No program can set ctime, so every ordinary write makes another state; decay of the medium does not. Standard
library only: the processes that look at large stores load nothing else.
"""

import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import NamedTuple

from vpmoe_assets.lineage.filememory import settled

_CHUNK = 100
"""Directories that one process looks at without a word."""


class TreeState(NamedTuple):
    """One state of a directory.

    Attributes:
        digest: Of all names, modes, inodes, sizes and times below it.
        files: How many there are.
        quiet: Whether every write after the look that found it makes another state: no file had changed in
            the moments before, within which its clock may stand still.
    """

    digest: str
    files: int
    quiet: bool

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> "TreeState":
        """Look at every name below a directory; links are not followed.

        Raises:
            OSError: It cannot be looked at.
        """
        began = time.time_ns()
        whole, changed, count, waiting = hashlib.sha256(), 0, 0, [os.fspath(directory)]
        while waiting:
            place = waiting.pop()
            found: dict[str, os.stat_result] = {}
            below: list[str] = []
            at = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with os.scandir(at) as entries:  # by descriptor: no path is walked again for each name
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):  # what is in it counts, not when it got there
                            below.append(entry.name)
                        else:
                            found[entry.name] = entry.stat(follow_symlinks=False)
            finally:
                os.close(at)
            names = sorted(found)
            below.sort()
            values = [value for name in names for value in _telling(found[name])]
            if values:
                changed = max(changed, max(values[_MTIME::_VALUES]), max(values[_CTIME::_VALUES]))
            count += len(names)
            listed = "\0".join([*names, "", *below]).encode("utf-8", "surrogateescape")
            whole.update(struct.pack("<QQQ", len(names), len(below), len(listed)) + listed)
            whole.update(struct.pack("<" + _PACKED * len(names), *values))
            waiting += [os.path.join(place, name) for name in below]
        return cls(whole.hexdigest(), count, settled((0, 0, 0, changed, changed), at_ns=began))


def _telling(found: os.stat_result) -> tuple[int, int, int, int, int, int]:
    """Return what tells one state of a file from another."""
    return (
        found.st_mode,
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


_MTIME, _CTIME, _VALUES = 4, 5, 6
_PACKED = "QQQQqq"


def states_of(directories: Sequence[str], workers: int = 1) -> Iterator[TreeState | None]:
    """Yield the state of each directory, None for one that cannot be looked at.

    Args:
        directories: In the order of the answers.
        workers: Processes; with more than one, the caller's main module has to be one that may be imported.
    """
    if workers == 1:
        yield from _look(directories)
        return
    from concurrent.futures import ProcessPoolExecutor  # loaded where a store is large
    from multiprocessing import get_context

    # Not forked: whoever asks may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for found in pool.map(_look, batched(directories, _CHUNK)):
            yield from found


def _look(directories: Sequence[str]) -> list[TreeState | None]:
    found: list[TreeState | None] = []
    for directory in directories:
        try:
            found.append(TreeState.of(directory))
        except OSError:
            found.append(None)
    return found
