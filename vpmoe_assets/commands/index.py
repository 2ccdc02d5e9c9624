"""`vpmoe sql` and `vpmoe index`: questions over all records at once."""

import sys
from typing import TYPE_CHECKING

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import json_option, open_store, print_json, print_table

if TYPE_CHECKING:
    from vpmoe_assets.lineage.index import Index


@click.command()
@click.argument("statement", metavar="STATEMENT")
@json_option
def sql(statement: str, as_json: bool) -> None:
    """Answer a SELECT over the index of all experiments; nothing can be written.

    Tables: artifacts, runs, inputs, files, shards, metrics, metric_points, checks, evals, perf.
    Views: latest, ladder, ancestry, drift, leaderboard.

    \b
    Examples:
      vpmoe sql "SELECT asset, version, bytes FROM latest ORDER BY bytes DESC"
      vpmoe sql "SELECT * FROM drift" --json
      vpmoe sql "DESCRIBE artifacts"
    """  # noqa: D301
    table = _index().query(statement)
    if as_json:
        print_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        numeric = [
            name
            for position, name in enumerate(table.columns)
            if all(isinstance(row[position], int | float | None) for row in table.rows)
        ]
        print_table(table.columns, table.rows, right=numeric)


@click.group()
def index() -> None:
    """Look after the DuckDB index, which is made from the records and never the truth."""


@index.command()
@json_option
def rebuild(as_json: bool) -> None:
    """Make the index again from the records alone; exit code 1 if a record could not be read.

    \b
    Example:
      vpmoe index rebuild
    """  # noqa: D301
    built = _index()
    damaged = built.rebuild(open_store())
    count = built.query("SELECT count(*) FROM artifacts").rows[0][0]
    if as_json:
        print_json(
            {
                "path": str(built.path),
                "artifacts": count,
                "digest": built.digest(),
                "unreadable": {f"{d.experiment}/{d.asset}/{d.version}": str(d.error) for d in damaged},
            }
        )
    else:
        click.echo(f"{count} artifacts in {built.path}, digest {built.digest()}")
        for broken in damaged:
            click.echo(f"left out: {broken.error}", err=True)
    if damaged:
        sys.exit(1)


def _index() -> "Index":
    from vpmoe_assets.lineage.index import Index

    return Index(project.store_root() / "index.duckdb")
