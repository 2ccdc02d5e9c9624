"""`vpmoe why`: why an asset is up to date, or is not, back to the root cause."""

from typing import TYPE_CHECKING

import click

from vpmoe_assets.commands.common import experiment_option, json_option, open_store, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpmoe_assets.lineage.staleness import Cause, Standing

_SAID = {
    "fresh": "is up to date: recipe, code, packages and inputs are those that it was made with",
    "stale": "is stale",
    "missing": "was never made",
    "unknown": "cannot be compared with what would be made now",
    "blocked": "is blocked: nothing is built on it",
    "damaged": "is damaged: its files are not what was published",
}


@click.command()
@click.argument("asset")
@experiment_option
@json_option
def why(asset: str, experiment: str | None, as_json: bool) -> None:
    """Say why ASSET is up to date, or is not, back to the root cause.

    Each cause is one of: a key of the recipe with its old and new value, the function whose code changed, a
    package with both releases, an input with other content and what made it so, an input that is stale itself
    and why. What a person accepted as the same is named.

    \b
    Examples:
      vpmoe why vpmoe_stage1
      vpmoe why full/vpmoe_stage2 --json
    """  # noqa: D301
    from vpmoe_assets import project
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.commands.present import present_of, unknown_asset
    from vpmoe_assets.lineage.reasons import Reasons
    from vpmoe_assets.lineage.remarks import Remarks
    from vpmoe_assets.lineage.staleness import standings

    named, _, version = asset.partition("@")
    if version:
        raise click.ClickException(
            f"{asset}: only the latest version can be up to date; without @{version}, `why` explains it"
        )
    present = present_of(named.rpartition("/")[0] or experiment or project.experiment_name())
    store, name = open_store(), named.rpartition("/")[2]
    found = standings(store, present.experiment, present.steps, strict=present.strict)
    if name not in found:
        raise unknown_asset(name, found, present.experiment)
    standing, causes = found[name], Reasons(store, found, current()).of(name)
    remarks = [] if standing.record is None else Remarks(store).inherited(standing.record)
    if as_json:
        print_json(
            {
                "experiment": present.experiment,
                **standing.to_dict(),
                "causes": [cause.to_dict() for cause in causes],
                "remarks": [remark.to_dict() for remark in remarks],
            }
        )
        return
    click.echo(f"{present.experiment}/{name}{_at(standing)} {_SAID[standing.state]}")
    _print(causes, "")
    for remark in (*((standing.covered,) if standing.covered else ()), *remarks):
        click.echo(f"! {remark.line()}")
    if standing.stale and not standing.marked:
        click.echo("Dagster marks it once that was made again, if it comes out different")


def _at(standing: "Standing") -> str:
    return "" if standing.record is None else f"@{standing.record.version}"


def _print(causes: "Sequence[Cause]", stem: str) -> None:
    for place, cause in enumerate(causes):
        last = place == len(causes) - 1
        was = f" (was {cause.old})" if cause.kind == "input" and cause.old else ""
        above = " (see above)" if cause.repeated else ""
        click.echo(f"{stem}{'└─ ' if last else '├─ '}{cause.line()}{was}{above}")
        _print(cause.causes, stem + ("   " if last else "│  "))
