"""`vpmoe reap`: what a killed orchestrator left running."""

import dataclasses

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import json_option, print_json


@click.command()
@click.option(
    "--grace",
    default=600.0,
    show_default=True,
    help="Seconds that a job gets to finish the checkpoint it is writing.",
)
@json_option
def reap(grace: float, as_json: bool) -> None:
    """End the jobs that a killed orchestrator left behind, close their Dagster runs, free their GPU slots.

    Jobs whose orchestrator is alive, and those of other machines, are left alone.

    \b
    Examples:
      vpmoe reap
      vpmoe reap --grace 30 --json
    """  # noqa: D301
    from vpmoe_assets.resources.processes import reap as reap_jobs

    done = reap_jobs(project.store_root(), grace_s=grace, log=lambda message: click.echo(message, err=True))
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in done])
        return
    if not done:
        click.echo("nothing to reap")
    for entry in done:
        what = entry.note or (
            f"ended {entry.processes} processes (last signal needed: {entry.needed})"
            + ("; its run is marked failed" if entry.run_failed else "")
        )
        click.echo(f"{entry.asset}: {what}")
