"""Opening the index's DuckDB file: how long to wait for whom, and what its errors mean."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe_assets.lineage.errors import IndexCorruptError, IndexLockedError

if TYPE_CHECKING:
    import duckdb

HINT = "run `vpmoe index rebuild`, which makes it again from the records"

_RETRY_S = 0.05
_THREADS = {"threads": "1"}
_CLOSED = {"enable_external_access": "false", "lock_configuration": "true"}


@contextlib.contextmanager
def opened(path: Path, *, read_only: bool, wait_s: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Open the file.

    Args:
        path: Of the file.
        read_only: Then files and the network are out of reach, too.
        wait_s: How long to wait for another process that has it open, in seconds.

    Raises:
        IndexLockedError: It still has; says which process.
        IndexCorruptError: The file is missing or unreadable.
    """
    import duckdb

    if not path.is_file():
        raise IndexCorruptError(f"there is no index at {path}; {HINT}")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            database = duckdb.connect(
                path, read_only=read_only, config=_THREADS | (_CLOSED if read_only else {})
            )
            break
        except duckdb.Error as error:
            if not _is_lock(error):
                raise IndexCorruptError(f"{path} is unreadable ({one_line(error)}); {HINT}") from error
            if time.monotonic() >= deadline:
                raise IndexLockedError(
                    f"{path} is locked by {_holder(error)} (waited {wait_s:.0f} s); "
                    "try again when it has finished"
                ) from error
            time.sleep(_RETRY_S)
    with contextlib.closing(database):
        yield database


def created(path: Path) -> contextlib.AbstractContextManager["duckdb.DuckDBPyConnection"]:
    """Open a new, empty file in the place of whatever is there."""
    import duckdb

    for leftover in (path, Path(f"{path}.wal")):
        leftover.unlink(missing_ok=True)
    return contextlib.closing(duckdb.connect(path, config=_THREADS))


def one_line(error: Exception) -> str:
    """Return the message of an error without its line breaks."""
    return " ".join(str(error).split())


def is_damage(error: Exception) -> bool:
    """Whether the file is to blame for an error, and not what was asked: a statement reads no other file."""
    import duckdb

    return isinstance(error, duckdb.IOException | duckdb.SerializationException | duckdb.FatalException)


def _is_lock(error: Exception) -> bool:
    return "lock on file" in str(error) or "different configuration" in str(error)


def _holder(error: Exception) -> str:
    match = re.search(r"held in (.+?) \(PID (\d+)\)", str(error))
    return f"pid {match[2]} ({match[1]})" if match else "another connection"
