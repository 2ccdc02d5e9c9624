"""The DuckDB index over all records, for questions in SQL. Never the truth: it can be rebuilt at any time.

One process writes at a time, under a lock of its own and in one short transaction; readers open the file
read-only. A rebuild makes a new file and puts it in the place of the old one, so that no reader meets a half,
and none of them is waited for.

Nobody hands a record over: whoever changes the store notes it (`vpmoe_assets.lineage.changes`), and `update`
takes up what is noted. So an update costs what has changed, and what one could not do is left to the next.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.answers import answer
from vpmoe_assets.lineage.changes import Change, Changes
from vpmoe_assets.lineage.database import HINT, created, is_damage, one_line, opened
from vpmoe_assets.lineage.errors import (
    BusyError,
    IndexCorruptError,
    IndexLockedError,
    IndexOutdatedError,
    LineageError,
    QueryError,
)

if TYPE_CHECKING:  # a question needs no record: what reads them is loaded by whoever writes
    import duckdb

    from vpmoe_assets.lineage.rebuilding import Key, Left
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.rows import Rows
    from vpmoe_assets.lineage.store import Store

SCHEMA_VERSION = 3
TABLES = (
    "artifacts",
    "runs",
    "attempts",
    "inputs",
    "files",
    "shards",
    "recipe_keys",
    "sources",
    "packages",
    "metrics",
    "metric_points",
    "checks",
    "statements",
    "evals",
    "perf",
)

PATIENCE_S = 2.0
"""How long a step waits for the index."""
_REBUILD_WAIT_S = 60.0
_READER_WAIT_S = 5.0


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
        self._changes = Changes(self.path.parent)

    # Writing.

    def update(self, store: "Store", also: Iterable[str] = ()) -> str | None:
        """Take up what has changed in a store; where nothing has, the file is not even opened.

        It is made again where it is absent, corrupt or of another version of this program.

        Args:
            store: That has changed.
            also: Versions (`experiment/asset/version`) that are to be taken up in any case.

        Returns:
            None, or what could not be done, and why, for a log. Nobody's work ends for the index: what is
            left stays noted for the next update, or for a rebuild.
        """
        try:
            for artifact in also:
                self._changes.note(artifact)
            changes = self._changes.pending()
            if not changes and self.path.is_file():
                return None
            # Whoever comes after one that waited in vain tries once.
            patience = 0.0 if changes and changes[0].age_s > PATIENCE_S else PATIENCE_S
            left = self._update(store, time.monotonic() + patience)
        except Exception as error:  # whatever it is, what is made again at any time is not worth a step
            return f"the index was not brought up to date: {one_line(error)}; {_LATER}"
        if left:
            return f"not brought up to date in the index: {_listed(left)}"
        return None

    def rebuild(self, store: "Store", workers: int = 1) -> "list[Left]":
        """Make the index again from the records alone, whoever reads the present one.

        Args:
            store: Of which.
            workers: Processes that read a large store; with more than one, the caller's main module has to be
                one that may be imported.

        Returns:
            The versions that are not in it.

        Raises:
            IndexLockedError: Another process kept writing for a minute.
        """
        with self._writer(_REBUILD_WAIT_S):
            return self._rebuild(store, workers)

    # Reading.

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> Table:
        """Answer one read-only SQL statement; files and the network are out of its reach.

        Raises:
            QueryError: The statement is wrong, or would change something.
            IndexLockedError: Another process is writing and did not finish in time; says which.
            IndexCorruptError: The file is missing, unreadable, or of another version of this program
                (`IndexOutdatedError`).
        """
        import duckdb

        try:
            sql.encode()
            statements = duckdb.extract_statements(sql)
        except UnicodeEncodeError as error:
            raise QueryError(f"the statement is not UTF-8 at character {error.start + 1}") from error
        except duckdb.Error as error:
            raise QueryError(one_line(error)) from error
        if len(statements) != 1:
            raise QueryError(f"one statement at a time, found {len(statements)}")
        if (kind := statements[0].type) not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
            raise QueryError(f"only SELECT (also WITH, SHOW, DESCRIBE, EXPLAIN) is answered, not {kind.name}")
        with opened(self.path, read_only=True, wait_s=_READER_WAIT_S) as database:
            self._of_this_version(database)
            try:
                return Table(*answer(database, sql, parameters))
            except duckdb.Error as error:
                if is_damage(error):
                    raise IndexCorruptError(f"{self.path} is damaged ({one_line(error)}); {HINT}") from error
                raise QueryError(one_line(error)) from error

    def of_assets(self, experiment: str, assets: Sequence[str]) -> "Rows":
        """Return the rows of all versions of some assets, by table.

        Raises:
            IndexLockedError: As `query`, also the others.
            IndexCorruptError: As `query`.
            QueryError: A table is not what it should be.
        """
        import duckdb

        with opened(self.path, read_only=True, wait_s=_READER_WAIT_S) as database:
            self._of_this_version(database)
            found: Rows = {}
            for table in TABLES:
                sql = f"SELECT * FROM {table} WHERE experiment = ? AND list_contains(?, asset)"
                try:
                    found[table] = database.execute(sql, [experiment, list(assets)]).fetchall()
                except duckdb.Error as error:
                    raise QueryError(one_line(error)) from error
        return found

    def digest(self) -> str:
        """Return the sha256 over the sorted digests of the records in the index."""
        rows = self.query("SELECT record_digest FROM artifacts").rows
        return records_digest(str(row[0]) for row in rows)

    def changing(self) -> set[str]:
        """Return the versions (`experiment/asset/version`) whose present state may not be in it yet."""
        return {change.artifact for change in self._changes.pending()}

    # Below: under the lock of whoever writes.

    @contextlib.contextmanager
    def _writer(self, wait_s: float) -> Iterator[None]:
        # What writes is loaded before anybody waits for the lock.
        import duckdb  # noqa: F401

        import vpmoe_assets.lineage.rebuilding  # noqa: F401

        lock = self.path.parent / ".work" / ".locks" / f"{self.path.stem}.lock"
        try:
            with locks.hold(lock, f"the index {self.path}", wait_s):
                yield
        except BusyError as error:
            raise IndexLockedError(str(error)) from error

    def _update(self, store: "Store", deadline: float) -> "list[Left]":
        with self._writer(_until(deadline)):
            if not self.path.is_file():
                return self._rebuild(store)
            changes = self._changes.pending()
            try:
                return self._apply(store, changes, deadline)
            except IndexCorruptError:
                return self._rebuild(store)

    def _apply(self, store: "Store", changes: Sequence[Change], deadline: float) -> "list[Left]":
        import duckdb

        from vpmoe_assets.lineage.layout import named_version
        from vpmoe_assets.lineage.rebuilding import Left

        left: list[Left] = []
        found: list[tuple[Key, Rows | None]] = []
        for artifact in dict.fromkeys(change.artifact for change in changes):
            experiment, asset, version = named_version(artifact)
            try:
                record = store.find(experiment, asset, version)
                rows = None if record is None else _rows(store, record)
            except (LineageError, OSError) as error:  # damaged: what was known of it stays
                left.append(Left(artifact, one_line(error)))
                continue
            found.append(((experiment, asset, version), rows))
        with opened(self.path, read_only=False, wait_s=_until(deadline)) as database:
            try:
                self._of_this_version(database)
                database.begin()
                _remove(database, [key for key, _ in found])
                _add(database, [rows for _, rows in found if rows is not None])
                database.commit()
                database.execute("CHECKPOINT")  # closing would do so, and leave damage that it meets unsaid
            except duckdb.Error as error:
                raise IndexCorruptError(f"{self.path}: {one_line(error)}; {HINT}") from error
        self._changes.settle(changes)
        return left

    def _rebuild(self, store: "Store", workers: int = 1) -> "list[Left]":
        from vpmoe_assets.lineage.rebuilding import everything

        self.path.parent.mkdir(parents=True, exist_ok=True)
        changes = self._changes.pending()
        left: list[Left] = []
        fresh = self.path.with_name(f".{self.path.name}.new")
        with created(fresh) as database:
            for part in ("index.sql", "views.sql"):
                database.execute(Path(__file__).with_name(part).read_text(encoding="utf-8"))
            database.execute("INSERT INTO meta VALUES (?)", (SCHEMA_VERSION,))
            types = {table: _types(database, table) for table in TABLES}
            for columns in everything(store.root, types, left, workers):
                database.begin()
                for table, rows in columns.items():
                    if rows.num_rows:
                        database.register("chunk", rows)
                        database.execute(f"INSERT INTO {table} SELECT * FROM chunk")
                        database.unregister("chunk")
                database.commit()
        Path(f"{self.path}.wal").unlink(missing_ok=True)
        os.replace(fresh, self.path)
        self._changes.settle(changes)
        return left

    def _of_this_version(self, database: "duckdb.DuckDBPyConnection") -> None:
        import duckdb

        try:
            found = database.execute("SELECT schema_version FROM meta").fetchall()
        except duckdb.Error as error:
            raise IndexCorruptError(f"{self.path} is unreadable ({one_line(error)}); {HINT}") from error
        if found != [(SCHEMA_VERSION,)]:
            raise IndexOutdatedError(f"{self.path} is of another version of this program; {HINT}")


_LATER = "the next publication makes up for it, or `vpmoe index rebuild`"


def records_digest(record_digests: Iterable[str]) -> str:
    """Return the sha256 of the canonical JSON of the sorted record digests."""
    return sha256_json(sorted(record_digests))


def _until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _rows(store: "Store", record: "Record") -> "Rows":
    from vpmoe_assets.lineage.rows import rows_of

    return rows_of(record, store.directory(record), store.statements.about(record))


def _remove(database: "duckdb.DuckDBPyConnection", keys: "Sequence[Key]") -> None:
    of_key = "WHERE experiment = ? AND asset = ? AND version = ?"
    # By the primary key; what is new, as most are, costs no look at the other tables, which have none.
    known = [key for key in keys if database.execute(f"SELECT 1 FROM artifacts {of_key}", key).fetchone()]
    for key in known:
        for table in TABLES:
            database.execute(f"DELETE FROM {table} {of_key}", key)


def _add(database: "duckdb.DuckDBPyConnection", found: "Sequence[Rows]") -> None:
    for table in TABLES:
        rows = [row for each in found for row in each[table]]
        if rows:
            # Whole columns as lists: a hundred times faster than row by row for a curve of 10,000 points.
            columns = ", ".join(f"unnest(?::{kind}[])" for kind in _types(database, table))
            database.execute(
                f"INSERT INTO {table} SELECT {columns}", [list(c) for c in zip(*rows, strict=True)]
            )


def _types(database: "duckdb.DuckDBPyConnection", table: str) -> list[str]:
    return [str(column[1]) for column in database.execute(f"DESCRIBE {table}").fetchall()]


def _listed(left: "Sequence[Left]") -> str:
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    return "; ".join(f"{each.artifact}: {each.message}" for each in left[:3]) + more
