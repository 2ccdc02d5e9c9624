"""`vpmoe sql`: questions over all records at once."""

from collections.abc import Sequence

import click

from vpmoe_assets.commands.common import (
    json_option,
    open_index,
    open_store,
    print_json,
    print_table,
)


@click.command()
@click.argument("statement", metavar="STATEMENT")
@json_option
def sql(statement: str, as_json: bool) -> None:
    """Answer a SELECT over the index of all experiments; nothing can be written.

    Tables: artifacts, runs, attempts, inputs, files, shards, recipe_keys, sources, packages, metrics,
    metric_points, checks, statements, evals, perf. Views: latest, ladder, ancestors, descendants, cost,
    changes, drift, leaderboard, acceptances, speed, phases. Like tables with an argument: ancestors_of,
    descendants_of (a record digest), changed_between (two dates), saw_shard (its name or sha256).
    docs/questions.md has questions with their SQL.

    \b
    Examples:
      vpmoe sql "SELECT asset, version, bytes FROM latest ORDER BY bytes DESC"
      vpmoe sql "SELECT * FROM drift" --json
      vpmoe sql "SELECT * FROM changed_between('2026-01-01', '2026-02-01')"
      vpmoe sql "DESCRIBE artifacts"
    """  # noqa: D301
    from vpmoe_assets.lineage.errors import IndexOutdatedError

    index = open_index()
    try:
        table = index.query(statement)
    except IndexOutdatedError:
        click.echo("the index is of another version of this program and is made again", err=True)
        index.rebuild(open_store())
        table = index.query(statement)
    if behind := len(index.changing()):
        click.echo(f"{behind} changed artifact{'s' * (behind != 1)} not in the index yet", err=True)
    if as_json:
        print_json([dict(zip(_distinct(table.columns), row, strict=True)) for row in table.rows])
    else:
        numeric = [
            name
            for position, name in enumerate(table.columns)
            if all(isinstance(row[position], int | float | None) for row in table.rows)
        ]
        print_table(table.columns, table.rows, right=numeric)


def _distinct(columns: Sequence[str]) -> list[str]:
    """Return the names with a suffix for one that was there before: `a`, `a_1`, `a_2`."""
    names: list[str] = []
    for column in columns:
        name, number = column, 0
        # Neither taken by one before, nor the own name of one that is still to come.
        while name in names or (number and name in columns):
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names
