"""Answers of DuckDB: what Python's own types would change arrives as DuckDB's text."""

import datetime
from typing import Any

import duckdb
import pytest

from vpmoe_assets.lineage.answers import answer

DAY = datetime.date(2020, 2, 3)
ASKED: dict[str, Any] = {
    "INTERVAL '1 month'": "1 month",
    "INTERVAL '30 days'": "30 days",
    "[INTERVAL '1 month']": ["1 month"],
    "'2020-01-01 00:00:00.123456789'::TIMESTAMP_NS": "2020-01-01 00:00:00.123456789",
    "'infinity'::DATE": "infinity",
    "'-infinity'::TIMESTAMP": "-infinity",
    "{'a': 'infinity'::TIMESTAMPTZ, 'DATE': 1}": {"a": "infinity", "DATE": 1},
    "DATE '2020-02-03'": DAY,
    "[DATE '2020-02-03']": [DAY],
    "MAP {'a': 1.5::DOUBLE}": {"a": 1.5},
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_value_is_what_duckdb_says(asked):
    with duckdb.connect() as database:
        columns, rows = answer(database, f"SELECT 1 AS same, {asked} AS same -- to the end", ())
    assert (columns, rows) == (("same", "same"), [(1, ASKED[asked])])


def test_order_parameters_and_rows_stay():
    statement = "SELECT n, INTERVAL (n) MONTH AS i FROM range($1) r(n) ORDER BY n DESC;"
    with duckdb.connect() as database:
        _, rows = answer(database, statement, (4,))
    assert rows == [(3, "3 months"), (2, "2 months"), (1, "1 month"), (0, "00:00:00")]
