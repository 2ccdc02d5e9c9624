"""The DuckDB index over all records, for questions in SQL. Never the truth: it can be rebuilt at any time.

One process writes at a time, under a lock of its own and in one short transaction; readers open the file
read-only. A rebuild makes a new file and puts it in the place of the old one, so that no reader meets a half.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.errors import BusyError, IndexCorruptError, IndexLockedError, QueryError
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.rows import rows_of
from vpmoe_assets.lineage.store import Damaged, Store

if TYPE_CHECKING:
    import duckdb

SCHEMA_VERSION = 1
TABLES = (
    "artifacts",
    "runs",
    "inputs",
    "files",
    "shards",
    "metrics",
    "metric_points",
    "checks",
    "evals",
    "perf",
)

_WRITER_WAIT_S = 60.0
_READER_WAIT_S = 5.0
_RETRY_S = 0.1
_HINT = "run `vpmoe index rebuild`, which makes it again from the records"


@dataclass(frozen=True)
class Table:
    """The answer to a query.

    Attributes:
        columns: Names.
        rows: Values as Python objects.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


class Index:
    """The index file.

    Args:
        path: Of the DuckDB file, usually `artifacts/index.duckdb`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def insert(self, record: Record, store: Store) -> None:
        """Add (or replace) one record; rebuilds everything where the file is absent, corrupt or out of step.

        Raises:
            IndexLockedError: Another process kept it locked for a minute. The artifact is published all the
                same, and the next insert or a rebuild picks it up.
        """
        with self._writer():
            if self.path.is_file():
                try:
                    self._insert(record, store)
                    return
                except IndexCorruptError:
                    pass
            self._rebuild(store)

    def rebuild(self, store: Store) -> list[Damaged]:
        """Make the index again from the records alone.

        Returns:
            The versions that are not in it because their record cannot be read.

        Raises:
            IndexLockedError: Another process kept it locked for a minute.
        """
        with self._writer():
            return self._rebuild(store)

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> Table:
        """Answer one read-only SQL statement; files and the network are out of its reach.

        Raises:
            QueryError: The statement is wrong, or would change something.
            IndexLockedError: Another process is writing and did not finish in time; says which.
            IndexCorruptError: The file is missing or unreadable.
        """
        import duckdb

        try:
            statements = duckdb.extract_statements(sql)
        except duckdb.Error as error:
            raise QueryError(_one_line(error)) from error
        if len(statements) != 1:
            raise QueryError(f"one statement at a time, found {len(statements)}")
        if (kind := statements[0].type) not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
            raise QueryError(f"only SELECT (also WITH, SHOW, DESCRIBE, EXPLAIN) is answered, not {kind.name}")
        with self._reader() as database:
            try:
                result = database.execute(sql, parameters)
                return Table(tuple(column[0] for column in result.description or ()), result.fetchall())
            except duckdb.Error as error:
                raise QueryError(_one_line(error)) from error

    def digest(self) -> str:
        """Return the sha256 over the sorted digests of the records in the index: its data version."""
        rows = self.query("SELECT record_digest FROM artifacts").rows
        return records_digest(str(row[0]) for row in rows)

    # Writing.

    @contextlib.contextmanager
    def _writer(self) -> Iterator[None]:
        lock = self.path.parent / ".work" / ".locks" / f"{self.path.stem}.lock"
        try:
            with locks.hold(lock, f"the index {self.path}", _WRITER_WAIT_S):
                yield
        except BusyError as error:
            raise IndexLockedError(str(error)) from error

    def _insert(self, record: Record, store: Store) -> None:
        rows = rows_of(record, store.directory(record), store.findings(record))
        import duckdb

        with self._open(read_only=False, wait_s=_WRITER_WAIT_S) as database:
            try:
                version = database.execute("SELECT schema_version FROM meta").fetchall()
                if version != [(SCHEMA_VERSION,)]:
                    raise IndexCorruptError(f"{self.path} is of another version of this program; {_HINT}")
                database.begin()
                _replace(database, record, rows)
                count = database.execute("SELECT count(*) FROM artifacts").fetchall()[0][0]
                database.commit()
            except duckdb.Error as error:
                raise IndexCorruptError(f"{self.path}: {_one_line(error)}; {_HINT}") from error
        # A publisher killed between record and index, or a version removed by hand, shows in the count.
        if count != _published(store):
            raise IndexCorruptError(
                f"{self.path} has {count} artifacts, the store {_published(store)}; {_HINT}"
            )

    def _rebuild(self, store: Store) -> list[Damaged]:
        import duckdb

        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.new")
        for leftover in (fresh, Path(f"{fresh}.wal")):
            leftover.unlink(missing_ok=True)
        with contextlib.closing(duckdb.connect(fresh, config={"threads": "1"})) as database:
            database.execute(Path(__file__).with_name("index.sql").read_text())
            database.execute("INSERT INTO meta VALUES (?)", (SCHEMA_VERSION,))
            for record in store.records():
                database.begin()
                _replace(database, record, rows_of(record, store.directory(record), store.findings(record)))
                database.commit()
        Path(f"{self.path}.wal").unlink(missing_ok=True)
        os.replace(fresh, self.path)
        return list(store.damaged())

    # Reading.

    @contextlib.contextmanager
    def _reader(self) -> Iterator["duckdb.DuckDBPyConnection"]:
        if not self.path.is_file():
            raise IndexCorruptError(f"there is no index at {self.path}; {_HINT}")
        with self._open(read_only=True, wait_s=_READER_WAIT_S) as database:
            yield database

    @contextlib.contextmanager
    def _open(self, read_only: bool, wait_s: float) -> Iterator["duckdb.DuckDBPyConnection"]:
        import duckdb

        config = {"threads": "1"}
        if read_only:
            config |= {"enable_external_access": "false", "lock_configuration": "true"}
        deadline = time.monotonic() + wait_s
        while True:
            try:
                database = duckdb.connect(self.path, read_only=read_only, config=config)
                break
            except duckdb.Error as error:
                if not _is_lock(error):
                    raise IndexCorruptError(
                        f"{self.path} is unreadable ({_one_line(error)}); {_HINT}"
                    ) from error
                if time.monotonic() > deadline:
                    raise IndexLockedError(
                        f"{self.path} is locked by {_lock_holder(error)} (waited {wait_s:.0f} s); "
                        "try again when it has finished"
                    ) from error
                time.sleep(_RETRY_S)
        with contextlib.closing(database):
            yield database


def records_digest(record_digests: Iterator[str] | list[str]) -> str:
    """Return the sha256 of the canonical JSON of the sorted record digests."""
    return sha256_json(sorted(record_digests))


def _replace(
    database: "duckdb.DuckDBPyConnection", record: Record, rows: dict[str, list[tuple[Any, ...]]]
) -> None:
    key = (record.experiment, record.asset, record.version)
    for table in TABLES:
        database.execute(f"DELETE FROM {table} WHERE experiment = ? AND asset = ? AND version = ?", key)
        if rows[table]:
            # Whole columns as lists: a hundred times faster than row by row for a curve of 10,000 points.
            types = [column[1] for column in database.execute(f"DESCRIBE {table}").fetchall()]
            columns = ", ".join(f"unnest(?::{kind}[])" for kind in types)
            database.execute(
                f"INSERT INTO {table} SELECT {columns}", [list(c) for c in zip(*rows[table], strict=True)]
            )


def _published(store: Store) -> int:
    return sum(1 for _ in store.root.glob(f"[!.]*/[!.]*/[!.]*/{RECORD_NAME}"))


def _is_lock(error: Exception) -> bool:
    return "lock on file" in str(error) or "different configuration" in str(error)


def _lock_holder(error: Exception) -> str:
    match = re.search(r"held in (.+?) \(PID (\d+)\)", str(error))
    return f"pid {match[2]} ({match[1]})" if match else "another connection"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
