"""`vpmoe pin` and `vpmoe unpin`: what is to be kept, whatever becomes of it."""

from typing import TYPE_CHECKING

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_in_force,
    experiment_option,
    find_record,
    json_option,
    open_index,
    open_store,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.store import Store


@click.command()
@click.argument("asset", metavar="[ASSET[@VERSION]]", required=False)
@experiment_option
@click.option("--because", metavar="TEXT", default="", help="Why; shown beside it.")
@json_option
def pin(asset: str | None, experiment: str | None, because: str, as_json: bool) -> None:
    """Keep an artifact, and all that it was made from, from being cleaned away. Without ASSET, list the pins.

    It is a statement about the record: who, when, why. The latest version is pinned where none is named; a
    newer one is not.

    \b
    Examples:
      vpmoe pin vpmoe_stage1@20260131.2-0a1b2c3d --because "the checkpoint of the paper"
      vpmoe pin
      vpmoe pin --json | jq -r '.[].artifact'
    """  # noqa: D301
    store = open_store()
    if asset is None:
        if because:
            raise click.UsageError("--because is said of an ASSET: name it")
        _list(store, experiment_in_force(experiment), as_json)
    else:
        _say(store, find_record(store, *asset_named(asset, experiment)), "pinned", because, as_json)


@click.command()
@click.argument("asset", metavar="ASSET[@VERSION]")
@experiment_option
@click.option("--because", metavar="TEXT", default="", help="Why; shown beside it.")
@json_option
def unpin(asset: str, experiment: str | None, because: str, as_json: bool) -> None:
    """End what `vpmoe pin` said of an artifact. Nothing is removed by it.

    \b
    Examples:
      vpmoe unpin vpmoe_stage1@20260131.2-0a1b2c3d --because "a better one was published"
    """  # noqa: D301
    store = open_store()
    _say(store, find_record(store, *asset_named(asset, experiment)), "unpinned", because, as_json)


def _say(store: "Store", record: "Record", kind: str, because: str, as_json: bool) -> None:
    from vpmoe_assets.lineage.collected import pinned
    from vpmoe_assets.lineage.layout import version_name
    from vpmoe_assets.lineage.statements import Statement

    name = version_name(record)
    is_pinned = pinned(store.statements.about(record)) is not None
    if is_pinned == (kind == "pinned") and not (is_pinned and because):  # another reason is worth saying
        if as_json:
            print_json({"artifact": name, "statement": None})
        else:
            click.echo(f"{name} is pinned already" if is_pinned else f"{name} is not pinned")
        return
    said = store.statements.append(Statement.about(record, kind, reason=because))
    open_index().update(store)
    if as_json:
        print_json({"artifact": name, "statement": said.id})
    else:
        click.echo(f"{name} {kind} by {said.author}" + (f": {because}" if because else ""))


def _list(store: "Store", experiment: str, as_json: bool) -> None:
    from vpmoe_assets.lineage.collected import pinned

    rows = []
    for asset in store.statements.assets(experiment):
        for said in store.statements.of_asset(experiment, asset, "pinned").values():
            if (pin := pinned(said)) is not None:
                rows.append(
                    {"artifact": pin.artifact, "author": pin.author, "time": pin.time, "reason": pin.reason}
                )
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"nothing is pinned in experiment {experiment}")
    else:
        columns = ("ARTIFACT", "BY", "ON", "BECAUSE")
        print_table(columns, [(r["artifact"], r["author"], r["time"][:16], r["reason"]) for r in rows])
