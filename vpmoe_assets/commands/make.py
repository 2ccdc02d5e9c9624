"""`vpmoe make`: the plan, a question where it costs much, and Dagster's own execution, readable."""

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    experiment_option,
    json_option,
    print_json,
    print_table,
    user_errors,
)
from vpmoe_assets.commands.selection import config_option, run_config, selection_argument
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from vpmoe_assets.planning.plan import Plan
    from vpmoe_assets.running.execution import Ran
    from vpmoe_assets.running.progress import Screen


@click.command()
@selection_argument
@experiment_option
@config_option
@click.option("--yes", is_flag=True, help="Do not ask, whatever it costs.")
@click.option(
    "--hours",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Ask where it is planned to take longer.",
)
@click.option(
    "--gigabytes",
    type=click.FloatRange(min=0),
    default=50.0,
    show_default=True,
    help="Ask where it is planned to take more disk. Every download is asked about.",
)
@json_option
def make(
    selection: str,
    experiment: str | None,
    config_json: str | None,
    yes: bool,
    hours: float,
    gigabytes: float,
    as_json: bool,
) -> None:
    """Make what of SELECTION is not up to date, and reuse the rest; everything by default.

    It is planned first (`vpmoe plan`), and a person is asked where it costs more than the limits; without a
    terminal it is refused then, unless --yes is given. Dagster executes it, as `dagster asset materialize`
    does. Each asset has a line, and the whole log is in a file. An interrupt lets a job write its checkpoint;
    the next run goes on from there. Exit code 1 where an asset or a blocking check failed.

    \b
    Examples:
      vpmoe make
      vpmoe make '+key:"smoke/vpmoe_stage1"'
      vpmoe make vpmoe_stage1 --yes --config-json '{"resources": {"trainer": {"config": {"device": "cuda"}}}}'
    """  # noqa: D301
    from vpmoe_assets import project
    from vpmoe_assets.commands.plan import planned

    named, config = experiment or project.experiment_name(), run_config(config_json)
    os.environ["VPMOE_EXPERIMENT"] = named  # the code location is loaded by it
    plan = planned(selection, named, config)
    _consent(plan, hours=hours, gigabytes=gigabytes, yes=yes, as_json=as_json)
    ran, screen, log = _run(plan, selection, named, config, as_json=as_json)
    if as_json:
        print_json(
            {
                "experiment": plan.experiment,
                "run_id": ran.run_id,
                "success": ran.success,
                "interrupted": screen.interrupted,
                "assets": [done.to_dict() for done in screen.done.values()],
                "log": str(log),
            }
        )
    else:
        _close(plan, ran, screen, named, log)
    if not ran.success:
        raise SystemExit(1)


def _consent(plan: "Plan", *, hours: float, gigabytes: float, yes: bool, as_json: bool) -> None:
    """Show what a run will do, and ask where it costs much.

    Raises:
        ClickException: It would end at an input that is not there, or nobody can be asked.
        Abort: A person said no.
    """
    from vpmoe_assets.commands.plan import print_plan, summary

    if refused := plan.refused:
        first = refused[0]
        remedy = f"select what it is made from, too: '+key:\"{plan.experiment}/{first.asset}\"'"
        raise click.ClickException(f"{first.asset}: {first.why}; {remedy}")
    costly = _costly(plan, hours, gigabytes)
    if as_json:
        click.echo(summary(plan), err=True)
    elif plan.costs:
        print_plan(plan, only_work=True)
    else:
        click.echo(summary(plan))
    if not costly or yes:
        return
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.ClickException(
            f"this takes {'; '.join(costly)}; look at it with `vpmoe plan`, and give --yes to start it"
        )
    click.confirm(f"This takes {'; '.join(costly)}. Start it?", abort=True)


def _costly(plan: "Plan", hours: float, gigabytes: float) -> list[str]:
    """Return what of a plan is beyond the limits."""
    found = []
    if plan.seconds > hours * 3600:
        found.append(f"about {plan.seconds / 3600:,.1f} h on {plan.device} (limit {hours:g})")
    if plan.disk > gigabytes * 1e9:
        found.append(f"{human_bytes(plan.disk)} of disk (limit {gigabytes:g} GB)")
    if plan.downloads:
        found.append(f"downloads from {', '.join(each.what for each in plan.downloads)}")
    if plan.lacking:
        found.append(f"what is missing here: {'; '.join(plan.lacking)}")
    return found


def _run(
    plan: "Plan", selection: str, named: str, config: dict[str, Any], *, as_json: bool
) -> "tuple[Ran, Screen, Path]":
    from trainer.contract.schema.experiment import load_experiment
    from vpmoe_assets.commands.common import open_store
    from vpmoe_assets.commands.present import CODE_LOCATION
    from vpmoe_assets.commands.selection import resolve
    from vpmoe_assets.resources.instances import MisplacedInstanceError
    from vpmoe_assets.running.execution import instance_of_commands, log_path, logged_to, open_location, run
    from vpmoe_assets.running.progress import Screen

    store, experiment = open_store(), load_experiment(named)

    def metrics(asset: str) -> dict[str, Any]:
        head = store.latest(plan.experiment, asset)
        return {} if head is None else dict(head.metrics)

    location = open_location(CODE_LOCATION)
    keys = resolve(selection, location.repository.asset_graph, plan.experiment)
    log = log_path(store.root)
    with (
        user_errors(MisplacedInstanceError),
        instance_of_commands() as instance,
        logged_to(log, to_stderr=as_json) as terminal,
        Screen(
            terminal,
            why={action.asset: action.why for action in plan.actions if action.what == "reuse"},
            steps={asset: experiment.train_recipe(asset).steps for asset in experiment.runs()},
            metrics=metrics,
            names=frozenset(key.path[-1] for key in keys),
        ) as screen,
    ):
        ran = run(instance, location, keys, config, screen.follow)
    return ran, screen, log


def _close(plan: "Plan", ran: "Ran", screen: "Screen", named: str, log: "Path") -> None:
    """Print how a run ended, the ladder's table where a checkpoint was asked for, and what to look at."""
    from trainer.contract.schema.experiment import load_experiment
    from vpmoe_assets.commands.common import open_store
    from vpmoe_assets.running.ladder import COLUMNS, ladder_rows
    from vpmoe_assets.running.progress import HOW
    from vpmoe_assets.units import human_duration

    done = screen.done.values()
    counts = [(how, sum(each.how == how for each in done)) for how in HOW]
    text = ", ".join(f"{count} {how}" for how, count in counts if count) or "nothing was made"
    took = human_duration(sum(each.seconds for each in done))
    store, ladder = open_store(), load_experiment(named).ladder()
    if any(action.asset in ladder for action in plan.actions):
        rows = ladder_rows(store, plan.experiment, ladder)
        click.echo()
        print_table(COLUMNS, rows, right=COLUMNS[1:])
    ended = "" if ran.success else "interrupted: " if screen.interrupted else "FAILED: "
    click.echo(f"\n{ended}{text}, in {took}")
    left = [action.asset for action in plan.actions if action.asset not in screen.done]
    if left:
        click.echo(f"not reached: {', '.join(left)}")
    failed = sorted(
        (each for each in done if each.message or each.failed_checks), key=lambda each: not each.message
    )
    if screen.interrupted:
        click.echo("the next `vpmoe make` goes on from the last checkpoint")
    elif not ran.success and failed:
        asset = failed[0].asset
        known = asset in {action.asset for action in plan.actions}
        click.echo(f"look at: {f'vpmoe show {asset}; vpmoe why {asset}; ' if known else ''}the log")
    else:
        last = next((action.asset for action in reversed(plan.actions)), None)
        click.echo(f"look at: vpmoe ls; make ui{'' if last is None else f'; vpmoe show {last}'}")
    click.echo(f"log: {log}")
