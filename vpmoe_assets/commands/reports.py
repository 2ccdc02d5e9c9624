"""`vpmoe reports`: the small JSON reports that people keep in git."""

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from vpmoe_assets.lineage.store import Store


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


def export_profile(store: "Store", experiment: str, output: Path) -> list[Path]:
    """Write the newest profile to `<output>/perf/<experiment>_<run>_<hardware>.json`; never a raw trace.

    Args:
        store: Where it is.
        experiment: Whose.
        output: Directory to write into.

    Returns:
        The file, or nothing where there is no profile.

    Raises:
        LineageError: It is damaged.
        DataError: It is of another format.
    """
    import json

    from trainer.contract.canonical import canonical_json
    from vpmoe_assets.speed import ENVELOPED_NAME, PROFILE, read_profile

    if store.latest(experiment, PROFILE) is None:
        return []
    record = store.require(experiment, PROFILE)
    content = read_profile(store.payload(record))
    enveloped = json.loads((store.directory(record) / "run" / ENVELOPED_NAME).read_bytes())
    kept = {**enveloped, **content, "version": record.version, "record_digest": record.record_digest}
    kept.pop("run_dir", None)  # a place on the machine that measured
    target = output / "perf" / f"{experiment}_{content['run_name']}_{content['hw_tag']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(canonical_json(kept, indent=1) + "\n", encoding="utf-8")
    return [target]
