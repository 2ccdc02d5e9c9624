"""Ledger and index, row by row, against the records: copies that nobody may have changed either."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any

from vpmoe_assets.lineage.errors import (
    IndexCorruptError,
    IndexLockedError,
    IndexOutdatedError,
    LineageError,
    QueryError,
    RecordError,
)
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.index import TABLES, Index
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.ledger import DIRECTORY
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.rows import Row, Rows, rows_of
from vpmoe_assets.lineage.store import Store

_OF_STATEMENTS = frozenset({"statements", "checks", "artifacts"})
"""Tables that say another thing where a statement is gone."""
_ASSETS = 20
"""Assets whose rows are held at once."""
_KEY = 3
"""Columns before what a row says: experiment, asset, version."""


def ledger_problems(store: Store, experiment: str, heads: Sequence[Head]) -> Iterator[Problem]:
    """Yield copies in the ledger, of versions that are gone, which were altered, taken away or slipped in.

    The copies of versions that are there are compared with their records elsewhere.
    """
    ledger, there, named = store.ledger, {head.record_digest for head in heads}, set[str]()
    for entry in sorted(ledger.entries(), key=lambda each: (each.asset, each.version)):
        named.add(entry.record_digest)
        if entry.experiment != experiment or entry.record_digest in there:
            continue
        shown = ledger.path(entry.record_digest).relative_to(store.root).as_posix()
        try:
            copy = ledger.get(entry.record_digest)
        except RecordError as error:
            yield Problem("ledger", version_name(entry), shown, f"the ledger's copy was altered: {error}")
            continue
        if copy is None:
            message = f"{DIRECTORY}/by-fingerprint names a record of which the ledger has no copy"
            yield Problem("ledger", version_name(entry), shown, message)
        elif not version_name(copy).startswith(version_name(entry)):  # else a line that a crash cut short
            message = f"{DIRECTORY}/by-fingerprint calls it so, its copy is of {version_name(copy)}"
            yield Problem("ledger", version_name(entry), shown, message)
    for digest in ledger.digests():
        if digest not in named:  # of a publication that was cut short, or of none
            try:
                ledger.get(digest)
            except RecordError as error:
                shown = ledger.path(digest).relative_to(store.root).as_posix()
                message = f"a copy that nothing names, and that is none: {error}"
                yield Problem("ledger", experiment, shown, message)


def index_problems(
    store: Store, index: Index, experiment: str, heads: Sequence[Head], *, whole: bool = True
) -> Iterator[Problem]:
    """Yield where the index says another thing than records and statements.

    What is changing right now is left out, and so is a record that was rewritten: its witnesses say so.

    Args:
        store: Where the records are.
        index: That is compared.
        experiment: Name.
        heads: Of what is compared.
        whole: Whether these are all versions of the experiment: then no row may be of another one.
    """
    changing = set(index.changing())
    by_asset: dict[str, list[Head]] = defaultdict(list)
    for head in heads:
        by_asset[head.asset].append(head)
    there = {version_name(head) for head in heads}
    try:
        known = list(by_asset)
        if whole:
            asked = " UNION ".join(f"SELECT asset FROM {table} WHERE experiment = ?" for table in TABLES)
            rows = index.query(asked, (experiment,) * len(TABLES)).rows
            known += sorted({asset for (asset,) in rows} - by_asset.keys())
        for assets in batched(known, _ASSETS):
            told = _told(index, experiment, assets)
            for head in (head for asset in assets for head in by_asset.get(asset, ())):
                if (name := version_name(head)) not in changing:
                    yield from _compared(store, head, told.get(name), index.path.name)
            for name in sorted(told.keys() - there - changing) if whole else ():
                yield from _of_nothing(name, told[name], index.path.name)
    except (IndexLockedError, IndexOutdatedError):
        return  # who could not be asked was said where the witnesses were
    except (IndexCorruptError, QueryError) as error:
        if index.path.exists():
            message = f"the index cannot be read ({error}); `vpmoe index rebuild` makes it again"
            yield Problem("index", experiment, index.path.name, message)


def _of_nothing(name: str, told: Rows, shown: str) -> Iterator[Problem]:
    """Yield rows of a version that is not there and that is not called an artifact either."""
    if not told["artifacts"]:
        for table in sorted(table for table in told if told[table] and table not in _OF_STATEMENTS):
            message = f"{table}: the index has {_shown(told[table][0])} of a version that there is not"
            yield Problem("index", name, shown, f"{message}; `vpmoe index rebuild` makes it again")


def _compared(store: Store, head: Head, said: Rows | None, shown: str) -> Iterator[Problem]:
    name = version_name(head)
    if said is None:
        yield Problem("index", name, shown, "not in the index; `vpmoe index rebuild` adds it")
        return
    try:
        record = store.record(head)
        rows = rows_of(record, store.directory(record), store.statements.about(record))
    except (LineageError, OSError):
        return  # reported with the record, or with the statements
    if all(row[_RECORD_DIGEST] == head.record_digest for row in said["artifacts"]):
        yield from _differences(name, rows, said, shown)


_RECORD_DIGEST = 8
"""Its column in `artifacts`."""
_STATEMENT_ID = 5
"""Its column in `statements`, as is the kind the next and the author the one after."""


def _told(index: Index, experiment: str, assets: Sequence[str]) -> dict[str, Rows]:
    """Return the rows of assets by version (`experiment/asset/version`)."""
    found: dict[str, Rows] = {}
    for table, rows in index.of_assets(experiment, assets).items():
        for row in rows:
            found.setdefault("/".join(row[:_KEY]), {name: [] for name in TABLES})[table].append(row)
    return found


def _differences(name: str, rows: Rows, told: Rows, shown: str) -> Iterator[Problem]:
    said = {row[_STATEMENT_ID]: row for row in told["statements"]}
    lost = [said[each] for each in said.keys() - {row[_STATEMENT_ID] for row in rows["statements"]}]
    for row in sorted(lost, key=lambda row: int(row[4])):
        message = (
            f"no longer there, but the index knows of it: {row[6]} by {row[7]} ({row[_STATEMENT_ID][:12]})"
        )
        yield Problem("statement", name, RECORD_NAME, message)
    for table in TABLES:
        if lost and table in _OF_STATEMENTS:
            continue
        ours, theirs = Counter(rows[table]), Counter(told[table])
        if ours != theirs:
            message = (
                f"{_first(table, ours, theirs)}; `vpmoe index rebuild` makes the index again from the records"
            )
            yield Problem("index", name, shown, message)


def _first(table: str, ours: "Counter[Row]", theirs: "Counter[Row]") -> str:
    wrong = sorted(map(_shown, theirs - ours))
    right = sorted(map(_shown, ours - theirs))
    if wrong and right:
        return f"{table}: the index has {wrong[0]}, the record {right[0]}"
    if wrong:
        return f"{table}: the index has {wrong[0]}, which the record has not"
    return f"{table}: the index has not {right[0]}"


def _shown(row: tuple[Any, ...]) -> str:
    text = ", ".join(str(value) for value in row[_KEY:] if value is not None)
    return f"({text[:120]}{'…' if len(text) > 120 else ''})"
