"""`vpmoe plan`: what a run would do, and what that takes, before anything runs."""

from typing import TYPE_CHECKING

import click

from vpmoe_assets.commands.common import (
    experiment_option,
    json_option,
    open_store,
    print_json,
    print_table,
    user_errors,
)
from vpmoe_assets.commands.selection import (
    config_option,
    plain_names,
    resolve,
    run_config,
    selection_argument,
)
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from vpmoe_assets.planning.actions import What
    from vpmoe_assets.planning.costs import Cost
    from vpmoe_assets.planning.plan import Plan


@click.command()
@selection_argument
@experiment_option
@config_option
@json_option
def plan(selection: str, experiment: str | None, config_json: str | None, as_json: bool) -> None:
    """Say what `vpmoe make SELECTION` would do: reuse, build or unknown, and why; and what that takes.

    SELECTION is Dagster's (docs/selections.md), or bare names; everything by default. Time is that of the
    last run here, or an estimate; memory is that of each device at the peak of a training step. What is
    missing on this machine is named with the remedy. Nothing runs, and no network is asked.

    \b
    Examples:
      vpmoe plan
      vpmoe plan '+key:"smoke/vpmoe_stage1"'
      vpmoe plan vpmoe_stage1,vpmoe_stage2 --json
      vpmoe plan -e full --config-json '{"resources": {"trainer": {"config":
          {"device": "cuda", "nproc": 8, "dp": 8, "ep": 8}}}}'
    """  # noqa: D301
    from vpmoe_assets import project

    found = planned(selection, experiment or project.experiment_name(), run_config(config_json))
    if as_json:
        print_json(found.to_dict())
        return
    print_plan(found)


def planned(selection: str, experiment: str, config: dict[str, object]) -> "Plan":
    """Return the plan of a selection.

    Args:
        selection: As typed.
        experiment: A name, or the path of its TOML file.
        config: Dagster's run configuration.
    """
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment
    from vpmoe_assets.commands.present import load_location, present_of
    from vpmoe_assets.lineage.staleness import standings
    from vpmoe_assets.planning.plan import plan_of

    present, store = present_of(experiment), open_store()
    names = plain_names(selection, present.steps, present.experiment)
    if names is None:
        graph = load_location(experiment)["defs"].get_repository_def().asset_graph
        names = [key.path[-1] for key in resolve(selection, graph, present.experiment)]
    found = standings(store, present.experiment, present.steps, strict=present.strict)
    with user_errors(ConfigError):
        return plan_of(store, load_experiment(experiment), present, found, names, config)


def print_plan(found: "Plan", *, only_work: bool = False) -> None:
    """Print a plan for people.

    Args:
        found: The plan.
        only_work: Leave out what is reused.
    """
    rows = [
        (action.asset, action.what, action.why, *_shown(found.costs.get(action.asset)))
        for action in found.actions
        if not (only_work and action.what == "reuse")
    ]
    if rows:
        columns = ("ASSET", "ACTION", "WHY", "TIME", "TOKENS", "MEMORY", "DISK")
        print_table(columns, rows, right=columns[3:])
    click.echo(summary(found))
    for download in found.downloads:
        size = (
            "of unknown size" if download.at_least is None else f"at least {human_bytes(download.at_least)}"
        )
        click.echo(f"download: {download.what}, {size}")
    for problem in found.lacking:
        click.echo(f"missing here: {problem}")


def summary(found: "Plan") -> str:
    """Return a plan in a line."""
    kinds: tuple[tuple[What, str], ...] = (
        ("reuse", "reused"),
        ("build", "built"),
        ("unknown", "unknown"),
        ("refuse", "refused"),
    )
    counts = [f"{found.count(what)} {word}" for what, word in kinds if found.count(what)]
    text = f"{len(found.actions)} assets of {found.experiment}: {', '.join(counts) or 'none'}"
    if found.costs:
        text += f"; {_time(found.seconds)} on {found.device}"
        if found.untimed:
            text += f" and what {len(found.untimed)} take that never ran here"
        text += f"; {human_bytes(found.disk)} of disk, {human_bytes(found.machine.free)} free"
    return text


def _shown(cost: "Cost | None") -> tuple[str, str, str, str]:
    if cost is None:
        return "", "", "", ""
    time = "" if cost.seconds is None else ("≈ " if cost.basis == "estimate" else "") + _time(cost.seconds)
    tokens = "" if cost.tokens is None else f"{cost.tokens:,}"
    memory, disk = ("" if size is None else human_bytes(size) for size in (cost.memory, cost.disk))
    return time, tokens, memory, disk


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h"
