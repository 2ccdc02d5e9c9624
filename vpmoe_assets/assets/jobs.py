"""The jobs of the launchpad: parts of the graph that people start together."""

from collections.abc import Iterable, Mapping

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

_JOBS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "data": (("sources", "data"), "Sources and training data, without any checkpoint."),
    "ladder": (
        ("rungs", "distill"),
        "Every checkpoint, from the donor to the last stage.",
    ),
    "evals": (("evals",), "Every checkpoint measured, and the ladder's page."),
}
"""Groups of each job, and what it is for."""


def experiment_jobs(groups: Iterable[str]) -> list[UnresolvedAssetJobDefinition]:
    """Return the jobs of an experiment.

    A job takes what its assets are made from; what is up to date is reused, so that costs nothing.

    Args:
        groups: That the experiment's graph has.
    """
    there = set(groups)
    jobs: list[UnresolvedAssetJobDefinition] = []
    for name, (wanted, description) in _JOBS.items():
        # Dagster takes a job of no asset for one of all.
        if chosen := [group for group in wanted if group in there]:
            selection = dg.AssetSelection.groups(*chosen).upstream()
            jobs.append(dg.define_asset_job(name, selection, description=description))
    return jobs
