"""`vpmoe diff`: what is different between two artifacts, runs or experiments."""

import sys
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from vpmoe_assets.commands.diff_lines import Section
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.store import Store

SAME, DIFFER, TROUBLE = 0, 1, 2
"""Exit codes, those of `diff`."""


class _Trouble(click.ClickException):
    exit_code = TROUBLE


class _Compares(click.Command):
    """A command whose exit code 1 says that things differ: every trouble ends in 2."""

    def invoke(self, ctx: click.Context) -> Any:
        from vpmoe_assets.lineage.errors import LineageError

        try:
            return super().invoke(ctx)
        except (BrokenPipeError, click.UsageError):
            raise
        except (LineageError, OSError) as error:
            raise _Trouble(" ".join(str(error).split())) from error
        except click.ClickException as error:
            raise _Trouble(error.message) from error


@click.command(cls=_Compares)
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@experiment_option
@click.option("--recipe", is_flag=True, help="Every value of the recipe that differs.")
@click.option("--code", is_flag=True, help="The code, as a unified difference.")
@click.option("--environment", is_flag=True, help="Machine, releases, packages and how it ran.")
@click.option("--metrics", is_flag=True, help="Every number, clocks included.")
@click.option("--files", is_flag=True, help="Every file, those of run/ included.")
@click.option("--tensors", is_flag=True, help="Checkpoints: norm of the difference of each tensor.")
@click.option("--rows", is_flag=True, help="Data sets: rows added, removed and changed.")
@click.option("--assets", is_flag=True, help="Runs and experiments: every asset, however many differ.")
@click.option("--markdown", is_flag=True, help="Print a Markdown document, with every list.")
@json_option
def diff(
    first: str, second: str | None, experiment: str | None, as_json: bool, markdown: bool, **details: bool
) -> None:
    """Say what differs between A and B: recipe, code, inputs, packages, numbers, checks, files.

    A and B are two artifacts, two runs or two experiments: ASSET[@VERSION], EXPERIMENT/ASSET[@VERSION], the
    first digits of a record's digest, the id of a Dagster run, the name of an experiment. Without B, A is
    compared with the version before it. The answer fits a screen; the options list more.

    Exit code 0: the same content, made in the same way. 1: something differs. 2: they could not be compared.

    \b
    Examples:
      vpmoe diff vpmoe_stage1                        # the latest with the one before it
      vpmoe diff smoke/vpmoe_stage1 wide/vpmoe_stage1 --code
      vpmoe diff vpdense_80 vpdense_80_healed --tensors
      vpmoe diff smoke wide --json | jq '.pairs[] | select(.state != "same").asset'
    """  # noqa: D301
    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two forms of one answer; give one of them")
    from vpmoe_assets.lineage.designation import Group, before, designated
    from vpmoe_assets.lineage.errors import ComparisonError

    store, place = open_store(), experiment_in_force(experiment)
    old = designated(store, first, place)
    if second is not None:
        new = designated(store, second, place)
    elif isinstance(old, Group):
        raise click.UsageError(f"{first} is a whole {old.what}: name the other one, too")
    else:
        old, new = before(store, old), old
    if isinstance(old, Group) and isinstance(new, Group) and old.what == new.what:
        same = _groups(store, old, new, details, as_json, markdown)
    elif isinstance(old, Group) or isinstance(new, Group):
        kinds = [each.what if isinstance(each, Group) else "artifact" for each in (old, new)]
        raise ComparisonError(
            f"{first} is of kind {kinds[0]} and {second} of kind {kinds[1]}: name two artifacts "
            "(ASSET@VERSION), two runs, or two experiments"
        )
    else:
        same = _artifacts(store, old, new, details, as_json, markdown)
    sys.exit(SAME if same else DIFFER)


def _artifacts(
    store: "Store", old: "Record", new: "Record", details: dict[str, bool], as_json: bool, markdown: bool
) -> bool:
    from vpmoe_assets.commands import diff_lines
    from vpmoe_assets.lineage.comparison import compare

    found = compare(store, old, new)
    wanted = [name for name, asked in details.items() if asked]
    if "environment" in wanted:
        wanted += ["execution", "packages"]
    if "assets" in wanted:
        raise click.UsageError("--assets is for two runs or two experiments")
    for option, kind in (("tensors", "checkpoint"), ("rows", "data set")):
        if option in wanted and found.kind != kind:
            raise click.UsageError(f"--{option} is for two {kind}s; {found.b.name} is of kind {found.kind}")
    answer = found.to_dict() if as_json else {}
    parts = [] if as_json else diff_lines.sections(found, [name for name in wanted if name != "code"])
    if "code" in wanted or markdown:
        from vpmoe_assets.lineage.code_changes import unified_between
        from vpmoe_assets.lineage.objects import ObjectStore

        code = list(unified_between(ObjectStore(store.root), old, new, found.code))
        answer["unified"] = code
        _replace(parts, diff_lines.Section("code", _said(parts, "code"), code, "code" in wanted, "diff"))
    if "tensors" in wanted:
        from dataclasses import asdict

        from vpmoe_assets.lineage.tensors import compare_tensors

        tensors = compare_tensors(store.payload(old), store.payload(new))
        answer["tensors"] = asdict(tensors) if as_json else None
        parts.append(diff_lines.tensor_section(tensors))
    if "rows" in wanted:
        from dataclasses import asdict

        from vpmoe_assets.lineage.row_changes import compare_rows

        rows = compare_rows(store.payload(old), store.payload(new))
        answer["rows"] = asdict(rows)
        parts.append(diff_lines.row_section(rows))
    if as_json:
        print_json(answer)
    else:
        _print(diff_lines.head(found), parts, found.notes, markdown)
    return found.same


def _groups(
    store: "Store", old: Any, new: Any, details: dict[str, bool], as_json: bool, markdown: bool
) -> bool:
    from vpmoe_assets.commands import diff_lines
    from vpmoe_assets.lineage.group_comparison import compare_groups

    wanted = [name for name, asked in details.items() if asked]
    if others := [name for name in wanted if name not in ("assets", "recipe")]:
        raise click.UsageError(f"--{others[0]} is for two artifacts; name one asset of each {old.what}")
    found = compare_groups(store, old, new)
    if as_json:
        print_json(found.to_dict())
    else:
        parts = diff_lines.group_sections(found, wanted)
        parts[0].shown = parts[0].shown or "recipe" in wanted
        _print(diff_lines.group_head(found), parts, found.notes, markdown)
    return found.same


def _said(parts: "list[Section]", title: str) -> str:
    return next((part.said for part in parts if part.title == title), "")


def _replace(parts: "list[Section]", section: "Section") -> None:
    parts[:] = [section if part.title == section.title else part for part in parts]


def _print(top: list[str], parts: "list[Section]", notes: tuple[str, ...], markdown: bool) -> None:
    from vpmoe_assets.commands import diff_lines

    form = diff_lines.as_markdown if markdown else diff_lines.as_text
    click.echo("\n".join(form(top, parts, notes)))
