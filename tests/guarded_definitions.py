"""A code location of four assets, guarded as the product's is; what ran is written into a file."""

import os
from pathlib import Path

import dagster as dg

from vpmoe_assets.selection_guard import install

install()


def _ran(name: str) -> None:
    with Path(os.environ["RAN"]).open("a") as file:
        file.write(f"{name}\n")


@dg.asset(key_prefix="tiny", group_name="sources", kinds={"json"})
def synth() -> None:
    _ran("synth")


@dg.asset(
    key_prefix="tiny",
    group_name="data",
    deps=[synth],
)
def kd() -> None:
    _ran("kd")


@dg.asset_check(asset=kd)
def readable() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.multi_asset(
    specs=[
        dg.AssetSpec(["tiny", "eval_a"], deps=[kd], group_name="evals"),
        dg.AssetSpec(["tiny", "eval_b"], deps=[kd], group_name="evals"),
    ],
    can_subset=True,
)
def evals(context: dg.AssetExecutionContext):
    for key in sorted(context.selected_asset_keys):
        _ran(key.path[-1])
        yield dg.MaterializeResult(asset_key=key)


defs = dg.Definitions(
    assets=[synth, kd, evals],
    asset_checks=[readable],
    jobs=[dg.define_asset_job("sources", selection="group:sources")],
    executor=dg.in_process_executor,
)
