"""`vpmoe reports`: the small JSON reports that people keep in git."""

from pathlib import Path

import click

from vpmoe_assets.commands.common import (
    experiment_option,
    json_option,
    open_store,
    print_json,
    refuse_store,
    user_errors,
)
from vpmoe_assets.project import experiment_name


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
    """Export the newest evaluation of every checkpoint, and the newest profile of the training step.

    They go to OUTPUT/eval/core8/<checkpoint>.json and OUTPUT/perf/<run>.json, are small, without raw traces,
    and are meant for git. An evaluation names the commit and the checkpoint's record, and says what changed
    since the checkpoint before. One whose files are not what its record says is refused.

    \b
    Examples:
      vpmoe reports
      vpmoe reports -e full --output /tmp/reports
    """  # noqa: D301
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment
    from vpmoe_assets.errors import DataError
    from vpmoe_assets.evaluation.export import export_reports
    from vpmoe_assets.speed import export_profile

    refuse_store(output)
    store = open_store()
    with user_errors(ConfigError, DataError):
        found = load_experiment(experiment or experiment_name())
        name = found.name
        exported = [
            *export_reports(store, name, found.ladder(), output),
            *export_profile(store, name, output),
        ]
        written = [str(path) for path in exported]
    if as_json:
        print_json({"experiment": name, "written": written})
    elif written:
        click.echo("\n".join(written))
    else:
        raise click.ClickException(
            f"{name}: nothing was evaluated or profiled yet; materialise group:evals or group:perf first, or "
            "name another with -e"
        )
