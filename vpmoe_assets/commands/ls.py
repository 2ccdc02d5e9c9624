"""`vpmoe ls`: the latest version of every asset, and where it stands."""

from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
    print_table,
)
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vpmoe_assets.lineage.latest import Latest
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.remarks import Remark
    from vpmoe_assets.lineage.staleness import PresentStep, Standing
    from vpmoe_assets.lineage.store import Store


@click.command()
@experiment_option
@json_option
def ls(experiment: str | None, as_json: bool) -> None:
    """List the latest version of every asset, and where it stands against present code and recipe.

    STATE says whether it may be built on, and whether it would be made the same now: fresh, stale (and why:
    the recipe, the code, a package, or something it came from is another one now), blocked by a check,
    damaged (a file is missing or has another size; `vpmoe verify` reads the contents too), unknown; and
    whether it counts, or was made from something that counts, because a person accepted it (`vpmoe accept`).
    `vpmoe why ASSET` goes to the root of it.

    \b
    Examples:
      vpmoe ls
      vpmoe ls -e full --json
    """  # noqa: D301
    from vpmoe_assets.lineage.latest import Latest
    from vpmoe_assets.lineage.remarks import Remarks
    from vpmoe_assets.lineage.staleness import standings

    store, name = open_store(), experiment_in_force(experiment)
    latest = Latest(store, name)
    found: dict[str, Standing] = {}
    untold: str | None = None
    if latest.assets:
        steps, strict, untold = _steps(latest, experiment)
        found = standings(store, name, steps, strict=strict, latest=latest)
    remarks = Remarks(store)
    rows = [
        _summary(store, standing, standing.record, remarks.about(standing.record))
        for standing in found.values()
        if standing.record is not None
    ]
    missing = [asset for asset, standing in found.items() if standing.state == "missing"]
    unreadable = {
        f"{broken.asset}@{broken.version}": str(broken.error)
        for asset in latest.assets
        for broken in latest.versions(asset)[1]
    }
    if as_json:
        print_json(
            {
                "experiment": name,
                "compared": untold is None,
                "artifacts": rows,
                "missing": missing,
                "unreadable": unreadable,
            }
        )
        return
    if untold is not None:
        click.echo(f"not compared with present code and recipe: {untold}", err=True)
    if not rows and not unreadable:
        click.echo(f"no artifacts of experiment {name} in {store.root}")
        return
    print_table(
        ("ASSET", "VERSION", "DIGEST", "SIZE", "PUBLISHED", "CHECKS", "STATE"),
        [
            (
                r["asset"],
                r["version"],
                r["digest"][:8],
                human_bytes(r["bytes"]),
                r["published_utc"][:16],
                f"{r['checks_passed']}/{r['checks']}" if r["checks"] else "-",
                r["text"],
            )
            for r in rows
        ],
        right=("SIZE",),
    )
    if missing and rows:
        click.echo(f"not made yet: {', '.join(missing)}")
    for where, error in unreadable.items():
        click.echo(f"unreadable: {where}: {error}", err=True)


def _steps(latest: "Latest", experiment: str | None) -> tuple["Mapping[str, PresentStep]", bool, str | None]:
    """Return an experiment's steps, whether its toolchain is strict; and why it cannot be asked."""
    from vpmoe_assets import project
    from vpmoe_assets.commands.present import present_of
    from vpmoe_assets.lineage.remembered import recorded_steps

    try:
        present = present_of(experiment or project.experiment_name())
    except click.ClickException as error:
        return recorded_steps(latest), False, error.message
    return present.steps, present.strict, None


def _summary(
    store: "Store", standing: "Standing", record: "Record", remarks: "Sequence[Remark]"
) -> dict[str, Any]:
    found, state = store.findings(record), standing.summary
    # What nobody stands by any more counts first: the rest is for `vpmoe show`.
    told = [remark for remark in remarks if remark.void and not remark.own] or list(remarks[-1:])
    if told:
        state += f"; {told[0].short()}"
    return {
        "asset": record.asset,
        "version": record.version,
        "sequence": record.sequence,
        "digest": record.digest,
        "bytes": record.size,
        "published_utc": record.published_utc,
        "checks": len(found),
        "checks_passed": sum(finding.outcome == "passed" for finding in found),
        "state": standing.state,
        "stale": standing.stale,
        "causes": [cause.to_dict() for cause in standing.causes],
        "text": state,
        "remarks": [remark.to_dict() for remark in remarks],
    }
