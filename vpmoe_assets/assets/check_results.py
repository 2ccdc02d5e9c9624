"""What Dagster shows of the last words on the checks of an artifact."""

from collections.abc import Sequence

import dagster as dg

from vpmoe_assets.events.metadata import finding_metadata
from vpmoe_assets.lineage.standing import Finding


def check_results(found: Sequence[Finding], key: dg.AssetKey) -> list[dg.AssetCheckResult]:
    """Return the findings as Dagster shows them, each with the version of the check that spoke."""
    return [
        dg.AssetCheckResult(
            asset_key=key,
            check_name=finding.check,
            passed=finding.outcome == "passed" or finding.waived_by is not None,
            severity=dg.AssetCheckSeverity(finding.severity),
            description=finding.reason or None,
            metadata=finding_metadata(finding),
        )
        for finding in found
    ]
