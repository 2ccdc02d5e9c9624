"""The rows of all records of a store, for an index that is made again: in columns, by several processes.

A record of a hundred files takes some milliseconds to read and check, and ten thousand of them most of a
minute of one core. Versions are read in chunks, and a chunk becomes one table of columns per table of the
index. Memory does not grow with the store: no more chunks are under way than there are processes to take
them, and one to spare.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import batched, groupby
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe_assets.lineage.database import one_line
from vpmoe_assets.lineage.errors import LineageError, RecordError
from vpmoe_assets.lineage.layout import directories, version_name
from vpmoe_assets.lineage.rows import Row, Rows, rows_of
from vpmoe_assets.lineage.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

Key = tuple[str, str, str]
"""Experiment, asset, version."""
Columns = dict[str, "pa.Table"]
"""Rows by table."""

_CHUNK = 100
_FEW = 1000
"""So many versions are read sooner than other processes have started."""


@dataclass(frozen=True)
class Left:
    """A version whose rows could not be made.

    Attributes:
        artifact: `experiment/asset/version`.
        message: Why.
    """

    artifact: str
    message: str


def everything(
    root: Path, types: Mapping[str, Sequence[str]], left: list[Left], workers: int
) -> Iterator[Columns]:
    """Yield the rows of every record of a store, and note the versions that have none.

    Args:
        root: Of the store.
        types: DuckDB's type of each column, by table.
        left: Is added to.
        workers: Processes; with more than one, the caller's main module has to be one that may be imported.
    """
    keys = list(_versions(Store(root)))
    chunks = [list(chunk) for chunk in batched(keys, _CHUNK)]
    if len(keys) <= _FEW or workers == 1:
        for chunk in chunks:
            columns, missing = read_chunk(root, chunk, types)
            left += missing
            yield columns
        return
    # Not forked: whoever asks may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        under_way: deque[Future[tuple[Columns, list[Left]]]] = deque()
        waiting = iter(chunks)
        for chunk in waiting:
            under_way.append(pool.submit(read_chunk, root, chunk, types))
            if len(under_way) > workers:
                columns, missing = under_way.popleft().result()
                left += missing
                yield columns
        for future in under_way:
            columns, missing = future.result()
            left += missing
            yield columns


def read_chunk(
    root: Path, keys: Sequence[Key], types: Mapping[str, Sequence[str]]
) -> tuple[Columns, list[Left]]:
    """Return the rows of some versions, and the versions that have none.

    A directory without a record does not exist, and is in neither.
    """
    store = Store(root)
    rows: list[Rows] = []
    left: list[Left] = []
    for (experiment, asset), named in groupby(keys, key=lambda key: key[:2]):
        for version, found in store.read(experiment, asset, [version for *_, version in named]):
            name = f"{experiment}/{asset}/{version}"
            try:
                if isinstance(found, RecordError):
                    raise found
                if (other := version_name(found)) != name:
                    raise RecordError(f"{store.directory(found)}: is the record of {other}")
                rows.append(rows_of(found, store.directory(found), store.statements.about(found)))
            except (LineageError, OSError) as error:
                left.append(Left(name, one_line(error)))
    return {
        table: _columns([row for each in rows for row in each[table]], types[table]) for table in types
    }, left


def _versions(store: Store) -> Iterator[Key]:
    for experiment in store.experiments():
        for asset in store.assets(experiment):
            for version in directories(store.root / experiment / asset):
                yield experiment, asset, version


def _columns(rows: Sequence[Row], types: Sequence[str]) -> "pa.Table":
    import pyarrow as pa

    known = {
        "VARCHAR": pa.string(),
        "JSON": pa.string(),
        "INTEGER": pa.int32(),
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
        "TIMESTAMP": pa.timestamp("us"),
    }
    values = zip(*rows, strict=True) if rows else ([] for _ in types)
    arrays = [pa.array(column, known[kind]) for column, kind in zip(values, types, strict=True)]
    return pa.table(arrays, names=[f"c{number}" for number in range(len(types))])
