"""Answers of DuckDB as Python values, where Python has none for what DuckDB says."""

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

_SHORTENED = re.compile(r'"(?:[^"]|"")*"|\b(INTERVAL|TIMESTAMP_NS)(?=$|[,)\[])')
"""Types of which DuckDB's Python loses something: months of an interval, nanoseconds."""
_TIMES = re.compile(
    r'"(?:[^"]|"")*"|\b(INTERVAL|TIMESTAMP WITH TIME ZONE|TIMESTAMP_NS|TIMESTAMP|DATE)(?=$|[,)\[])'
)
_EXTREMES = (datetime.date.min, datetime.date.max)
"""Also what DuckDB's Python makes of an infinite date or time."""


def answer(
    database: "duckdb.DuckDBPyConnection", sql: str, parameters: Sequence[Any]
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Run one statement that reads.

    A column of times that Python's would change (an interval in months, nanoseconds, infinity) is asked for
    as DuckDB's own text instead.

    Args:
        database: Open.
        sql: The statement.
        parameters: Its parameters.

    Returns:
        Names of the columns, and rows.
    """
    result = database.execute(sql, parameters)
    columns = result.description or []
    types = [str(column[1]) for column in columns]
    rows = result.fetchall()
    as_text = {
        position
        for position, kind in enumerate(types)
        if _mentions(_SHORTENED, kind)
        or (_mentions(_TIMES, kind) and any(_extreme(row[position]) for row in rows))
    }
    if as_text:
        wanted = ", ".join(
            f"CAST(c{position} AS {_TIMES.sub(_as_text, kind)})" if position in as_text else f"c{position}"
            for position, kind in enumerate(types)
        )
        names = ", ".join(f"c{position}" for position in range(len(types)))
        rows = database.execute(
            f"SELECT {wanted} FROM ({sql.strip().rstrip(';')}\n) AS answer({names})", parameters
        ).fetchall()
    return tuple(column[0] for column in columns), rows


def _mentions(pattern: re.Pattern[str], kind: str) -> bool:
    return any(match[1] for match in pattern.finditer(kind))


def _as_text(match: re.Match[str]) -> str:
    return "VARCHAR" if match[1] else match[0]


def _extreme(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_extreme, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(_extreme, value))
    day = value.date() if isinstance(value, datetime.datetime) else value
    return isinstance(day, datetime.date) and day in _EXTREMES
