"""`vpmoe watch`: the jobs at work, how far they are, and how long they still take."""

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    NARROWEST,
    experiment_in_force,
    json_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from vpmoe_assets.running.detached import Working

_COLUMNS = ("ASSET", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "WHERE", "LAUNCHER")
_RIGHT = ("STEP", "LOSS", "TOKENS/S", "LEFT")


@click.command()
@click.option("-e", "--experiment", metavar="NAME", help="Of this experiment alone: a name, or a TOML file.")
@click.option("--once", is_flag=True, help="Look once; as wherever the output is no terminal.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.2),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@json_option
def watch(experiment: str | None, once: bool, every: float, as_json: bool) -> None:
    """Show the jobs at work in this store: step, loss, tokens per second, time left, machine, launcher.

    Whoever started them, and whether that still lives: a job on Slurm is shown while it is queued, too. On a
    terminal it looks again until it is interrupted; --json looks once. What they do is read from their work
    areas, so it works from every machine that sees the store.

    \b
    Examples:
      vpmoe watch
      vpmoe watch --once -e full
      vpmoe watch --json | jq '.[].left_s'
    """  # noqa: D301
    from vpmoe_assets.running.detached import working

    root = project.store_root()
    named = None if experiment is None else experiment_in_force(experiment)
    if as_json:
        print_json([job.to_dict() for job in working(root, named)])
        return
    if once or not sys.stdout.isatty():
        if found := working(root, named):
            print_table(_COLUMNS, [_row(job) for job in found], right=_RIGHT)
        else:
            click.echo("no job is at work")
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    console.width = max(console.width, NARROWEST)
    with Live(_table(working(root, named)), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(max(0.2, every))  # no number is less than 0.2 for click, and no time to wait
                live.update(_table(working(root, named)), refresh=True)
        except KeyboardInterrupt:
            return


def _table(found: "list[Working]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = time.strftime("%H:%M:%S") + ("" if found else "  no job is at work")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for job in found:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in _row(job)))
    return table


def _row(job: "Working") -> list[Any]:
    from vpmoe_assets.units import human_duration

    state = job.phase if job.state == "running" and job.phase else job.state
    if job.state == "silent" and job.silent_s is not None:
        state = f"silent for {human_duration(job.silent_s)}"
    step = "" if job.step is None else str(job.step) + ("" if job.steps is None else f"/{job.steps}")
    return [
        f"{job.experiment}/{job.asset}",
        state,
        step,
        None if job.loss is None else f"{job.loss:.4g}",
        None if job.tokens_per_second is None else f"{job.tokens_per_second:,.0f}",
        None if job.left_s is None else human_duration(job.left_s),
        job.host,
        " ".join(filter(None, (job.launcher, job.job_id))),
    ]
