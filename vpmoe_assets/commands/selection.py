"""Selections of assets, in Dagster's syntax, with bare names for the experiment's own."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from vpmoe_assets.commands.common import user_errors

if TYPE_CHECKING:
    from dagster import AssetKey
    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

EVERYTHING = "*"

selection_argument = click.argument("selection", required=False, default=EVERYTHING)
config_option = click.option(
    "--config-json",
    metavar="JSON",
    help="Dagster's run configuration: how jobs run, such as the device of resource `trainer`.",
)


def bare_names(selection: str, known: Collection[str]) -> list[str] | None:
    """Return the assets of a selection that is everything or a list of bare names; None of any other.

    Args:
        selection: As typed.
        known: Names of the assets.
    """
    if selection == EVERYTHING:
        return list(known)
    parts = [part.strip() for part in selection.split(",")]
    return parts if all(part in known for part in parts) else None


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
    import json

    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"--config-json is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.ClickException('--config-json: expected an object, such as {"resources": {…}}')
    return found
