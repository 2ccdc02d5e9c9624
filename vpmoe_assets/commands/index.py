"""`vpmoe index`: looking after the DuckDB index."""

import sys

import click

from vpmoe_assets.commands.common import json_option, open_index, open_store, print_json


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
    built = open_index()
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
