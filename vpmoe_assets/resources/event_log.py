"""Dagster's SQLite event log, held open while a run lasts.

Dagster opens a connection for each event and closes it again. Where it is the only one, closing it carries
SQLite's write-ahead log over into the database and waits for the disk, hundreds of times in a run. One more
connection, held by the process that executes the run, spares that; what is written, and when it is safe on
the disk, is the same.
"""

import os
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagster import DagsterInstance

_held: dict[str, sqlite3.Connection] = {}


def hold_open(instance: "DagsterInstance", run_id: str) -> None:
    """Hold the event log of a run and the index over all runs, until this process ends or holds another's.

    Does nothing for an instance that keeps its events elsewhere, or where they cannot be opened.

    Args:
        instance: That records the run.
        run_id: Of the run that this process executes.
    """
    from dagster._core.storage.event_log.sqlite.sqlite_event_log import (
        INDEX_SHARD_NAME,
        SqliteEventLogStorage,
    )

    log = instance.event_log_storage
    if not isinstance(log, SqliteEventLogStorage):
        return
    wanted = {os.path.abspath(log.path_for_shard(shard)) for shard in (run_id, INDEX_SHARD_NAME)}
    for path in _held.keys() - wanted:
        _held.pop(path).close()
    for path in wanted - _held.keys():
        with suppress(sqlite3.Error):
            connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, check_same_thread=False)
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # it takes its place in the log
            _held[path] = connection
