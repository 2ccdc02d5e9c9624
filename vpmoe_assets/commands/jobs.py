"""`vpmoe reap`: what a killed orchestrator left running."""

import dataclasses
from typing import TYPE_CHECKING

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import json_option, print_json, user_errors

if TYPE_CHECKING:
    from vpmoe_assets.resources.reaping import Reaped


@click.command()
@click.option(
    "--grace",
    default=600.0,
    show_default=True,
    help="Seconds that a job gets to finish the checkpoint it is writing.",
)
@click.option(
    "--host-gone", metavar="HOST", help="Take HOST for gone for good, and let go of what is recorded on it."
)
@json_option
def reap(grace: float, host_gone: str | None, as_json: bool) -> None:
    """End the jobs that a killed orchestrator left behind, close their Dagster runs, free their GPU slots.

    Each run is closed in the Dagster instance that it was started in, whatever DAGSTER_HOME says now. Jobs
    whose orchestrator is alive are left alone, and so are those of other machines, which are named. A machine
    that will never answer is given up with --host-gone: its runs are closed, its work directories are free.

    \b
    Examples:
      vpmoe reap
      vpmoe reap --grace 30 --json
      vpmoe reap --host-gone node-17
    """  # noqa: D301
    from vpmoe_assets.resources import reaping

    root = project.store_root()
    if host_gone is not None:
        with user_errors(reaping.HostNotGoneError):
            done = reaping.give_up_host(root, host_gone)
    else:
        done = reaping.reap(root, grace_s=grace, log=lambda message: click.echo(message, err=True))
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in done])
        return
    if not done:
        click.echo("nothing to reap")
    for entry in done:
        click.echo(f"{entry.asset or f'run {entry.dagster_run_id}'}: {_what(entry)}")


def _what(entry: "Reaped") -> str:
    done = []
    if entry.asset is not None and (entry.processes or not entry.note):
        done.append(f"ended {entry.processes} processes (last signal needed: {entry.needed})")
    if entry.run_failed:
        done.append("its run is marked failed" if entry.asset is not None else "marked failed")
    if entry.note:
        done.append(entry.note)
    return "; ".join(done)
