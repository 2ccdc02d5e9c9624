"""A graph that does nothing: what Dagster itself takes for as many assets and checks as another graph has.

`BARE_ASSETS` and `BARE_CHECKS` say how many; the checks are spread evenly over the assets.
"""

import os
from collections import Counter

import dagster as dg

_ASSETS, _CHECKS = int(os.environ["BARE_ASSETS"]), int(os.environ["BARE_CHECKS"])
_CHECKS_OF = Counter(number % _ASSETS for number in range(_CHECKS))


def _asset(number: int) -> dg.AssetsDefinition:
    name = f"asset_{number}"
    checks = [dg.AssetCheckSpec(f"check_{check}", asset=name) for check in range(_CHECKS_OF[number])]

    @dg.asset(name=name, deps=[f"asset_{number - 1}"] if number else [], check_specs=checks)
    def bare() -> dg.MaterializeResult:
        results = [dg.AssetCheckResult(check_name=check.name, passed=True) for check in checks]
        return dg.MaterializeResult(data_version=dg.DataVersion("0"), check_results=results)

    return bare


defs = dg.Definitions(assets=[_asset(number) for number in range(_ASSETS)], executor=dg.in_process_executor)
