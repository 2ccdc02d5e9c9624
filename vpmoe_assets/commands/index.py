"""`vpmoe index`: looking after the DuckDB index."""

import os
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
    built, store = open_index(), open_store()
    left = built.rebuild(store, workers=min(len(os.sched_getaffinity(0)), 8))
    remembered = store.rebuild_ledger()
    count = built.query("SELECT count(*) FROM artifacts").rows[0][0]
    if as_json:
        print_json(
            {
                "path": str(built.path),
                "artifacts": count,
                "digest": built.digest(),
                "remembered": remembered,
                "unreadable": {each.artifact: each.message for each in left},
            }
        )
    else:
        click.echo(f"{count} artifacts in {built.path}, digest {built.digest()}")
        if remembered:
            click.echo(f"{remembered} records of an earlier version of this program put into the ledger")
        for each in left:
            click.echo(f"left out: {each.artifact}: {each.message}", err=True)
    if left:
        sys.exit(1)
