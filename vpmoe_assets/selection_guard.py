"""A selection that matches nothing runs nothing.

`dagster asset materialize --select` and `dg launch --assets` (Dagster 1.13.27) resolve the selection to a
set of keys and hand that to `execute_job`, for which an empty set means *no subset*: a misspelt
`key:"smoke/typo"`, or a group or kind that nobody has, materialises the whole graph, with exit code 0. With
the experiment `full` that starts every download. Bare keys (`smoke/typo`) are refused by Dagster itself;
expressions are not, and neither is one empty part among several.

Between resolving and running, both commands ask the repository for the implicit job of those keys, and
nothing else of ours is on their way. So that method is wrapped when the code location loads. The keys alone
cannot show which part of a selection was empty; the selection as it was typed is a parameter of the running
click command.

The daemon (sensors) asks the same method with the keys of a run request, and is answered as before: it names
its assets and checks itself. The UI launches runs by keys and never asks.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator

import click
import dagster as dg
from dagster._core.definitions.asset_selection import (
    ChainedAssetSelection,
    OperandListAssetSelection,
    SubtractAssetSelection,
)
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

_PARAMETERS = ("select", "assets")
_ATTRIBUTE = re.compile(r'(key|group|kind):"([^"]*)"')


class SelectionError(click.ClickException):
    """A selection, or a part of it, matches no asset; one line for the terminal, exit code 1."""


def install() -> None:
    """Guard the selections of Dagster's commands in this process.

    Raises:
        AttributeError: Dagster has no such method any more; the guard has to be moved.
    """
    asked = dg.RepositoryDefinition.get_implicit_job_def_for_assets
    if hasattr(asked, "__wrapped__"):
        return

    @functools.wraps(asked)
    def guarded(self: dg.RepositoryDefinition, asset_keys: Iterable[dg.AssetKey]) -> dg.JobDefinition | None:
        if (typed := typed_selection()) is not None:
            refuse_empty_parts(typed, self.asset_graph)
        return asked(self, asset_keys)

    dg.RepositoryDefinition.get_implicit_job_def_for_assets = guarded  # type: ignore[method-assign]


def refuse_empty_parts(typed: str, graph: AssetGraph) -> None:
    """Hold every part of a selection to matching something: what commas, `or`, `and`, `not` and `+` join.

    Args:
        typed: The selection, as on the command line.
        graph: Of the code location.

    Raises:
        SelectionError: A part matches no asset. The smallest one is named, with the nearest that there is.
    """
    for text in typed.split(","):  # as Dagster splits it
        for part in _parts(dg.AssetSelection.from_string(text)):
            if not part.resolve(graph):
                raise SelectionError(
                    f"{part} matches no asset, so nothing of the selection {typed!r} runs. "
                    f"{_nearest(str(part), graph)}"
                )


def typed_selection() -> str | None:
    """Return the selection of the command that is running, None where none is."""
    context = click.get_current_context(silent=True)
    given = [context.params.get(name) for name in _PARAMETERS] if context else []
    return next((value for value in given if isinstance(value, str)), None)


def _parts(selection: dg.AssetSelection) -> Iterator[dg.AssetSelection]:
    """Yield a selection after all that it is made of."""
    if isinstance(selection, OperandListAssetSelection):
        inner = list(selection.operands)
    elif isinstance(selection, SubtractAssetSelection):
        inner = [selection.left, selection.right]
    else:
        inner = [selection.child] if isinstance(selection, ChainedAssetSelection) else []
    for part in inner:
        yield from _parts(part)
    yield selection


def _nearest(part: str, graph: AssetGraph) -> str:
    match = _ATTRIBUTE.fullmatch(part)
    if match is None:
        return "`dagster asset list` with the same options lists what a selection matches."
    attribute, value = match.groups()
    nodes = list(graph.asset_nodes)
    there = {
        "key": {node.key.to_user_string() for node in nodes},
        "group": {node.group_name for node in nodes if node.group_name},
        "kind": {kind for node in nodes for kind in node.kinds},
    }[attribute]
    near = difflib.get_close_matches(value, sorted(there), n=1, cutoff=0.0)
    return f'The nearest {attribute} is "{near[0]}".' if near else f"There is no {attribute}."
