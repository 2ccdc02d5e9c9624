"""`vpmoe verify`: is everything still what was published?"""

import sys

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
)


@click.command()
@click.argument("asset", required=False)
@experiment_option
@click.option("--quick", is_flag=True, help="Compare names and sizes only; read no contents.")
@json_option
def verify(asset: str | None, experiment: str | None, quick: bool, as_json: bool) -> None:
    """Read every byte of an artifact and of all it came from, and compare it with the records.

    Without ASSET, every version of the experiment. The records themselves are compared with what the index,
    the ledger and statements remember: one that was rewritten is named, and a version that is gone. Names
    each bad file; exit code 1 if there is one. A note is an explained difference.

    \b
    Examples:
      vpmoe verify
      vpmoe verify synth_kd_v1
      vpmoe verify --json | jq -r '.problems[].path'
    """  # noqa: D301
    from vpmoe_assets.lineage.digest import hash_files
    from vpmoe_assets.lineage.verify import verify_artifact, verify_experiment

    store, index = open_store(), open_index()
    hasher = None if quick else hash_files
    if asset:
        record = find_record(store, *asset_named(asset, experiment))
        done = verify_artifact(store, index, record, hasher=hasher)
    else:
        done = verify_experiment(store, index, experiment_in_force(experiment), hasher=hasher)
    count, problems = len(done.records), done.problems
    if as_json:
        print_json(
            {
                "artifacts": count,
                "problems": [each.to_dict() for each in problems],
                "notes": [each.to_dict() for each in done.notes],
            }
        )
    else:
        for each in problems:
            click.echo(str(each))
        for each in done.notes:
            click.echo(f"note: {each}")
        found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "all intact"
        click.echo(f"{count} artifact{'s' * (count != 1)} verified: {found}", err=bool(problems))
    if problems:
        sys.exit(1)
