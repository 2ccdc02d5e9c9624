"""`vpmoe card`: the model card of a checkpoint."""

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
@json_option
def card(asset: str, experiment: str | None, as_json: bool) -> None:
    """Print the model card of a checkpoint: Markdown with front matter, from its record and what was found.

    \b
    Examples:
      vpmoe card vpmoe_stage1 > README.md
      vpmoe card vpmoe_stage1@20260131.2-0a1b2c3d --json | jq -r .card
    """  # noqa: D301
    from vpmoe_assets.lineage.model_card import model_card

    store = open_store()
    record = find_record(store, *asset_named(asset, experiment))
    text = model_card(store, record)
    if as_json:
        print_json({"record_digest": record.record_digest, "card": text})
    else:
        click.echo(text, nl=False)
