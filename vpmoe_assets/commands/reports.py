"""`vpmoe reports`: the small JSON reports that people keep in git."""

import shutil
from pathlib import Path

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
)

EVAL_PREFIX = "eval_"


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("reports"),
    show_default=True,
    help="Directory to write into.",
)
@experiment_option
@json_option
def reports(output: Path, experiment: str | None, as_json: bool) -> None:
    """Export the newest evaluation of every checkpoint to OUTPUT/eval/core8/<checkpoint>.json.

    The files name the commit and the checkpoint's record, are small, and are meant for git. An evaluation
    whose files are not what its record says is refused.

    \b
    Examples:
      vpmoe reports
      vpmoe reports -e full --output /tmp/reports
    """  # noqa: D301
    store = open_store()
    name = experiment_in_force(experiment)
    written: list[str] = []
    for asset in store.assets(name):
        if not asset.startswith(EVAL_PREFIX) or store.latest(name, asset) is None:
            continue
        record = store.require(name, asset)
        checkpoint = asset.removeprefix(EVAL_PREFIX)
        target = output / "eval" / "core8" / f"{checkpoint}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.directory(record) / "run" / f"{checkpoint}.json", target)
        written.append(str(target))
    if as_json:
        print_json({"experiment": name, "written": written})
    elif written:
        click.echo("\n".join(written))
    else:
        raise click.ClickException(
            f"{name}: nothing was evaluated yet; materialise group:evals first, or name another with -e"
        )
