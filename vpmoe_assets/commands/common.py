"""What the commands share: options, the store and experiment in force, and how answers are printed."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vpmoe_assets import project

if TYPE_CHECKING:
    from vpmoe_assets.lineage.index import Index
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.store import Store

F = TypeVar("F", bound=Callable[..., Any])

NARROWEST = 40
"""Columns of a table on a terminal, whatever it says it has: on one there is nothing to read."""

experiment_option = click.option(
    "-e", "--experiment", metavar="NAME", help="Experiment: a name, or the path of its TOML file."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def open_store() -> "Store":
    """Return the store of this environment."""
    from vpmoe_assets.lineage.store import Store

    return Store(project.store_root())


def refuse_store(output: Path) -> None:
    """Refuse an output inside the store, whose files are published and nothing else.

    Raises:
        click.ClickException: It is; says what to do.
    """
    root = project.store_root()
    if (place := Path(os.path.realpath(output))) == root or root in place.parents:
        raise click.ClickException(f"--output {output} lies in the store {root}; choose a place outside it")


def open_index() -> "Index":
    """Return the index of this environment's store."""
    from vpmoe_assets.lineage.index import Index

    return Index(project.store_root() / "index.duckdb")


def experiment_in_force(option: str | None) -> str:
    """Return the name of an experiment: a TOML file is opened for it, a bare name is taken as it is."""
    named = option or project.experiment_name()
    if not named.endswith(".toml"):
        return named
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment

    with user_errors(ConfigError):
        return load_experiment(named).name


def asset_named(text: str, experiment: str | None) -> tuple[str, str, str | None]:
    """Split `[EXPERIMENT/]ASSET[@VERSION]` into experiment, asset and version."""
    name, _, version = text.partition("@")
    prefix, _, asset = name.rpartition("/")
    return (prefix or experiment_in_force(experiment)), asset, version or None


def find_record(store: "Store", experiment: str, asset: str, version: str | None) -> "Record":
    """Return the latest (or the named) version of an asset.

    Raises:
        ArtifactMissing: There is none; says what there is.
    """
    from vpmoe_assets.lineage.errors import ArtifactMissing

    record = store.find(experiment, asset, version)
    if record is None:
        known = (
            ", ".join(store.versions(experiment, asset) if version else store.assets(experiment)) or "none"
        )
        wanted = f"{experiment}/{asset}" + (f"@{version}" if version else "")
        raise ArtifactMissing(f"{wanted} is not in {store.root}; there is: {known}")
    return record


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that the user can act on into one line and exit code 1."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(" ".join(str(error).split())) from error


def print_json(value: Any) -> None:
    """Print a value as JSON, with nothing of it lost."""
    from trainer.contract.printed import exact_json

    click.echo(exact_json(value, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Print rows under a header: ruled on a terminal, plainly aligned elsewhere.

    Args:
        columns: Headers.
        rows: Values; None is left blank.
        right: Columns to be aligned right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console = Console()
        console.width = max(console.width, NARROWEST)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (list(columns), *cells):
        aligned = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        )
        click.echo("  ".join(aligned).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("\n", "\\n")
