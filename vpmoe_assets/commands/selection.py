"""Selections of assets, in Dagster's syntax, with bare names for the experiment's own."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from trainer.contract.json_text import parse_json
from vpmoe_assets.commands.common import user_errors

if TYPE_CHECKING:
    from dagster import AssetKey
    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

    from vpmoe_assets.lineage.staleness import PresentStep

EVERYTHING = "*"

selection_argument = click.argument("selection", required=False, default=EVERYTHING)
config_option = click.option(
    "--config-json",
    metavar="JSON",
    help="Dagster's run configuration: how jobs run, such as the device of resource `trainer`.",
)


def plain_names(selection: str, steps: "Mapping[str, PresentStep]", experiment: str) -> list[str] | None:
    """Return the assets of a selection that takes no Dagster to understand; None of any other.

    That is everything, or a list of bare names, of `experiment/name`, of `key:"experiment/name"` and of the
    last with `+` in front, for all that it is made from (`+experiment/name` is Dagster's older syntax, and
    one step up there). The code location need not be loaded for it.

    Args:
        selection: As typed.
        steps: Of the experiment, by bare name.
        experiment: Name.
    """
    if selection == EVERYTHING:
        return list(steps)
    found: set[str] = set()
    for part in (part.strip() for part in selection.split(",")):
        named = re.fullmatch(rf'(\+?)key:"{re.escape(experiment)}/(\w+)"', part)
        up, name = (named[1], named[2]) if named else ("", part.removeprefix(f"{experiment}/"))
        if name not in steps:
            return None
        behind, waiting = {name}, [name] if up else []
        while waiting:
            step = steps[waiting.pop()]
            above = {*step.inputs, *step.partial} - behind
            if not above <= steps.keys():
                return None
            waiting += above
            behind |= above
        found |= behind
    return [name for name in steps if name in found]


def resolve(selection: str, graph: "AssetGraph", experiment: str) -> "set[AssetKey]":
    """Return the keys of a selection.

    Args:
        selection: As typed; a bare name stands for the asset of the experiment.
        graph: Of the code location.
        experiment: Name.

    Raises:
        SelectionError: A part matches nothing, or is no selection.
    """
    import warnings

    import dagster as dg

    from vpmoe_assets.selection_guard import refuse_empty_parts

    names = {key.path[-1] for key in graph.materializable_asset_keys}
    parts = [part.strip() for part in selection.split(",")]
    given = [f"{experiment}/{part}" if part in names else part for part in parts]
    with user_errors(dg.DagsterError), warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # of Dagster's own call, for `*`
        refuse_empty_parts(",".join(given), graph)
        found = dg.AssetSelection.from_coercible(given).resolve(graph)
    return {key for key in found if key in graph.materializable_asset_keys}


def run_config(text: str | None) -> dict[str, object]:
    """Return a run configuration given as JSON.

    Raises:
        ClickException: It is none.
    """
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError as error:
        raise click.ClickException(f"--config-json is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.ClickException('--config-json: expected an object, such as {"resources": {…}}')
    return found
