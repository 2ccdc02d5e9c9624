"""`vpmoe verify`: is everything still what was published?"""

import sys

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_in_force,
    experiment_option,
    find_record,
    json_option,
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

    Without ASSET, every version of the experiment. Names each bad file; exit code 1 if there is one.

    \b
    Examples:
      vpmoe verify
      vpmoe verify synth_kd_v1
      vpmoe verify --json | jq -r '.problems[].path'
    """  # noqa: D301
    from vpmoe_assets.lineage.integrity import Problem
    from vpmoe_assets.lineage.verify import verify_record

    store = open_store()
    problems: list[Problem] = []
    if asset:
        records = [find_record(store, *asset_named(asset, experiment))]
    else:
        name = experiment_in_force(experiment)
        records = list(store.records(name))
        problems += [
            Problem("record", f"{d.experiment}/{d.asset}/{d.version}", ".artifact.json", str(d.error))
            for d in store.damaged(name)
        ]
    seen: set[str] = set()
    for record in records:
        problems += verify_record(store, record, deep=not quick, seen=seen)
    if as_json:
        print_json({"artifacts": len(seen), "problems": [problem.to_dict() for problem in problems]})
    else:
        for problem in problems:
            click.echo(str(problem))
        found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "all intact"
        click.echo(f"{len(seen)} artifact{'s' * (len(seen) != 1)} verified: {found}", err=bool(problems))
    if problems:
        sys.exit(1)
