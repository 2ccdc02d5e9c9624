"""`vpmoe report-events`: a Dagster instance learns what the store holds."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
    user_errors,
)


@click.command("report-events")
@experiment_option
@click.option("--offer", is_flag=True, help="Ask first on a terminal; elsewhere only say what could be done.")
@json_option
def report_events(experiment: str | None, offer: bool, as_json: bool) -> None:
    """Tell Dagster what the store holds: each version that it does not know, as an event outside of runs.

    For a new checkout on a shared store, or after .dagster was lost: assets read "never materialized" until
    Dagster has an event of them. What is told comes from the records, so that what is out of date with
    present code is marked as after a run. Again, nothing is told twice. The instance is that of DAGSTER_HOME,
    or of the project's .env.

    \b
    Examples:
      vpmoe report-events
      vpmoe report-events -e full --json
      vpmoe report-events --offer          # what `make ui` begins with
    """  # noqa: D301
    name = experiment_in_force(experiment)
    store = open_store()
    if not store.assets(name):
        if as_json:
            print_json({"experiment": name, "reported": [], "known": 0, "older": []})
        elif not offer:
            click.echo(f"no artifacts of experiment {name} in {store.root}")
        return
    home = _home()
    from graphlib import CycleError

    from dagster import DagsterError

    from vpmoe_assets.events.reporting import report_store, unreported
    from vpmoe_assets.resources.told import instance_at

    with user_errors(DagsterError, OSError, CycleError), instance_at(home) as instance:
        if offer:
            missing = unreported(instance, store, name)
            if not missing or not _wanted(len(missing), name):
                return
        reported = report_store(instance, store, name, _optional(experiment))
    if as_json:
        print_json(
            {
                "experiment": name,
                "reported": reported.versions,
                "known": reported.known,
                "older": reported.older,
            }
        )
        return
    click.echo(f"{len(reported.versions)} versions of {name} reported; Dagster knew {reported.known} already")
    if reported.older:
        click.echo(f"left out, being older than what is known of their asset: {', '.join(reported.older)}")


def _optional(experiment: str | None) -> dict[str, Sequence[str]]:
    """Return the optional inputs of each asset; none of an experiment that does not load."""
    from vpmoe_assets.commands.present import present_of

    try:
        steps = present_of(experiment or project.experiment_name()).steps
    except click.ClickException:
        return {}
    return {asset: step.partial for asset, step in steps.items() if step.partial}


def _wanted(count: int, experiment: str) -> bool:
    said = f"Dagster does not know the latest versions of {count} assets of {experiment} in the store"
    if sys.stdin.isatty() and sys.stderr.isatty():
        return click.confirm(f"{said}. Report them, once?", default=True, err=True)
    click.echo(f"{said}: `vpmoe report-events` reports them, once", err=True)
    return False


def _home() -> Path:
    """Return the directory of the instance: `$DAGSTER_HOME`, or that of the project's `.env`.

    Raises:
        ClickException: Neither names one.
    """
    home = os.environ.get("DAGSTER_HOME") or _in_env_file()
    if not home or not os.path.isabs(home):
        said = f"DAGSTER_HOME is {home!r}, no absolute path" if home else "there is no DAGSTER_HOME"
        raise click.ClickException(f"{said}: run `make setup`, which writes .env, or set DAGSTER_HOME")
    return Path(home)


def _in_env_file() -> str | None:
    from dotenv import dotenv_values

    file = Path(project.ROOT / ".env")
    return dotenv_values(file).get("DAGSTER_HOME") if file.is_file() else None
