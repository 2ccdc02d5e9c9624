"""`vpmoe path`: where the payload of an artifact lies."""

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
)


@click.command()
@click.argument("asset")
@experiment_option
@click.option("--unchecked", is_flag=True, help="Do not look whether it is intact and not blocked.")
@json_option
def path(asset: str, experiment: str | None, unchecked: bool, as_json: bool) -> None:
    """Print the payload directory of an artifact; refuses one that is damaged or blocked by its checks.

    \b
    Examples:
      ls "$(vpmoe path synth_kd_v1)"
      python -m trainer generate --checkpoint "$(vpmoe path vpmoe_stage1)"
    """  # noqa: D301
    store = open_store()
    name = asset_named(asset, experiment)
    record = find_record(store, *name) if unchecked else store.require(*name)
    if as_json:
        print_json({"path": str(store.payload(record)), "version": record.version, "digest": record.digest})
    else:
        click.echo(str(store.payload(record)))
