"""`vpmoe forget`: a person states that a version was removed on purpose."""

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    json_option,
    open_index,
    open_store,
    print_json,
)


@click.command()
@click.argument("asset", metavar="ASSET@VERSION")
@experiment_option
@click.option("--because", metavar="TEXT", required=True, help="Why it was removed.")
@json_option
def forget(asset: str, experiment: str | None, because: str, as_json: bool) -> None:
    """State that a version which is no longer in the store was removed on purpose.

    `vpmoe verify` and `lineage_index` name a version that is gone as a problem until somebody says so.
    Nothing is removed by it, and a version that is made again with the same bytes is restored all the same.

    \b
    Examples:
      vpmoe forget vpmoe_stage1@20260131.2-0a1b2c3d --because "an early trial; the disk was full"
    """  # noqa: D301
    from vpmoe_assets.lineage.collected import removed_on_purpose
    from vpmoe_assets.lineage.errors import ArtifactMissing
    from vpmoe_assets.lineage.record import Origin
    from vpmoe_assets.lineage.statements import Statement
    from vpmoe_assets.lineage.witnesses import sightings

    store = open_store()
    place, name, version = asset_named(asset, experiment)
    if version is None:
        raise click.UsageError("name the version, too: ASSET@VERSION")
    if store.find(place, name, version) is not None:
        raise click.ClickException(f"{place}/{name}/{version} is still in {store.root}: it is not gone")
    known = sightings(store, open_index(), place).sightings
    concerned = [each for each in known if (each.asset, each.version) == (name, version)]
    digests = sorted({each.record_digest for each in concerned if each.record_digest})
    if not digests:
        raise ArtifactMissing(f"nobody remembers a {place}/{name}/{version}")
    said = []
    for digest in digests:
        if not removed_on_purpose(store.statements.about_digest(place, name, digest)):
            gone = Origin(experiment=place, asset=name, version=version, record_digest=digest)
            said.append(store.statements.append(Statement.about(gone, "collected", reason=because)))
    open_index().update(store)
    if as_json:
        print_json({"artifact": f"{place}/{name}/{version}", "statements": [each.id for each in said]})
    else:
        click.echo(
            f"{place}/{name}/{version} was removed on purpose" + ("" if said else ", as stated before")
        )
