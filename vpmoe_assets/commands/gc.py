"""`vpmoe gc`: what a store could do without, and, where asked, doing without it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vpmoe_assets.commands.common import json_option, open_index, open_store, print_json, print_table
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from vpmoe_assets.lineage.collecting import Plan, Sort

_SORTS = ("resume", "payloads", "work", "objects")


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what could go, and remove nothing: also without it.")
@click.option(
    "--delete",
    "sorts",
    multiple=True,
    type=click.Choice(_SORTS),
    help="Remove what could go of this class; may be given several times.",
)
@click.option(
    "--keep",
    metavar="N",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help="Newest versions of each asset that are kept.",
)
@click.option("--because", metavar="TEXT", default="", help="Why; part of each statement.")
@click.option("--list", "listing", is_flag=True, help="List everything that could go.")
@json_option
def gc(
    dry_run: bool, sorts: tuple["Sort", ...], keep: int, because: str, listing: bool, as_json: bool
) -> None:
    """Show what the store could do without, by class; remove a class only with --delete.

    Kept are pinned versions (`vpmoe pin`), the newest ones of each asset, and all that they were made from,
    in every experiment. Records always stay. The classes: `resume` (resume checkpoints of trainings that are
    done), `payloads` (files of versions from which nothing that is kept was made), `work` (what killed runs
    left), `objects` (snapshots that only such versions name: they cannot be made again then). What goes is
    stated, and `vpmoe verify` knows. FREES is what the disk gains: files with other names stay.

    \b
    Examples:
      vpmoe gc
      vpmoe gc --keep 3 --list
      vpmoe gc --delete resume --because "the disk is full"
      vpmoe gc --json | jq .freed
    """  # noqa: D301
    from vpmoe_assets.lineage.collecting import collect, plan

    store = open_store()
    if dry_run or not sorts:
        if because:
            raise click.UsageError("--because says why something goes: it needs --delete, and no --dry-run")
        found, done = plan(store, latest=keep, at_work=_at_work), False
    else:
        wanted = list(dict.fromkeys(sorts))
        sizes = plan(store, latest=keep, at_work=_at_work)
        freed, together = {sort: sizes.freed([sort]) for sort in wanted}, sizes.freed(wanted)
        found, done = collect(store, wanted, latest=keep, at_work=_at_work, reason=because), True
        open_index().update(store)
        if as_json:
            print_json({"deleted": freed, "freed": together})
            return
        click.echo(f"removed: {', '.join(wanted)}; {human_bytes(together)} freed")
        _skipped(found)
        return
    if as_json:
        print_json({**found.to_dict(), "dry_run": not done})
        return
    _show(found, listing)


def _show(found: "Plan", listing: bool) -> None:
    from vpmoe_assets.lineage.collecting import MEANING, SORTS

    rows = [
        (
            sort,
            sum(item.sort == sort for item in found.items),
            human_bytes(found.size([sort])),
            human_bytes(found.freed([sort])),
            MEANING[sort],
        )
        for sort in SORTS
    ]
    print_table(("CLASS", "ITEMS", "SIZE", "FREES", "WHAT"), rows, right=("ITEMS", "SIZE", "FREES"))
    if listing:
        click.echo()
        items = [(item.sort, human_bytes(item.size), item.what, item.why) for item in found.items]
        print_table(("CLASS", "SIZE", "WHAT", "WHY"), items, right=("SIZE",))
    _skipped(found)
    pins = sum(why == "pinned" for why in found.kept.values())
    click.echo(
        f"{len(found.kept)} versions are kept, {pins} of them pinned; all together would free "
        f"{human_bytes(found.freed())}. Nothing was removed: --delete CLASS does"
    )


def _skipped(found: "Plan") -> None:
    for line in found.skipped:
        click.echo(f"left alone: {line}", err=True)


def _at_work(area: Path) -> bool:
    from vpmoe_assets.resources.detached import DetachedJob
    from vpmoe_assets.resources.process_record import ProcessRecord

    try:
        return ProcessRecord.read(area) is not None or DetachedJob.read(area) is not None
    except ValueError:  # unreadable: `vpmoe reap` says so, and nobody knows that it has ended
        return True
