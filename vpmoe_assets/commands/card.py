"""`vpmoe card`: the card of a checkpoint or data set."""

from pathlib import Path

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
    refuse_store,
)


@click.command()
@click.argument("asset", metavar="ASSET[@VERSION]")
@experiment_option
@click.option(
    "--output",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write README.md there, and croissant.json beside that of a data set.",
)
@json_option
def card(asset: str, experiment: str | None, output: str | None, as_json: bool) -> None:
    """Print the card of a checkpoint or data set: Markdown with front matter, from its record.

    Of a data set --json prints Croissant 1.1 (JSON-LD): every file with sha256 and size, the rows in record
    sets with their fields, sources with their terms, and what it was made from. Its paths are relative to the
    payload. A card says nothing but what records, statements and the files themselves say.

    \b
    Examples:
      vpmoe card vpmoe_stage1 > README.md
      vpmoe card synth_kd_v1 --json > croissant.json
      vpmoe card synth_harmony --output card/
      vpmoe card vpmoe_stage1@20260131.2-0a1b2c3d --json | jq -r .card
    """  # noqa: D301
    from vpmoe_assets.lineage.croissant import FILE_NAME, croissant
    from vpmoe_assets.lineage.model_card import data_card, model_card
    from vpmoe_assets.lineage.row_files import holds_rows

    if output is not None:
        refuse_store(Path(output))
    store = open_store()
    record = find_record(store, *asset_named(asset, experiment))
    rows = croissant(store, record) if holds_rows(record) else None
    text = model_card(store, record) if rows is None else data_card(store, record)
    if output is not None:
        from trainer.contract.printed import exact_json

        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, "README.md").write_text(text)
        if rows is not None:
            Path(output, FILE_NAME).write_text(exact_json(rows, indent=1) + "\n")
    if as_json:
        print_json({"record_digest": record.record_digest, "card": text} if rows is None else rows)
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"README.md{f' and {FILE_NAME}' if rows is not None else ''} written to {output}")
