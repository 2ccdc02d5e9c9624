"""The index over all records, verified against them."""

from collections.abc import Mapping, Sequence

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.step import asset_key
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource


def lineage_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """Return the `lineage` group."""
    key = asset_key(experiment, "lineage_index")

    @dg.asset(
        key=key,
        group_name="lineage",
        kinds={"duckdb"},
        check_specs=[
            dg.AssetCheckSpec("counts_equal_records", asset=key, blocking=True),
            dg.AssetCheckSpec("records_verify", asset=key, blocking=True),
        ],
        op_tags={"dagster/priority": "-100"},  # after everything else of the same run
    )
    def lineage_index(store: StoreResource, index: IndexResource) -> dg.MaterializeResult:
        """The DuckDB index of all records, made again from them and verified.

        Artifacts are indexed as they are published, so a rung that failed is in it too; this asset shows that
        the index says what the records say, and rehashes every file they name. Ask it with
        `vpmoe sql "SELECT * FROM ladder"`.
        """
        from vpmoe_assets.lineage.verify import verify_record

        opened, database = store.open(), index.open()
        left = database.rebuild(opened)
        records = list(opened.records())
        seen: set[str] = set()
        problems = [each.message for each in left]
        for record in records:
            problems += [str(problem) for problem in verify_record(opened, record, seen=seen)]
        counts = _counted(database)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(database.digest()),
            metadata={
                **{name: dg.MetadataValue.int(count) for name, count in counts.items()},
                "index": dg.MetadataValue.path(database.path),
                "example": dg.MetadataValue.md(
                    '```\nvpmoe sql "SELECT asset, version, digest FROM latest"\n```'
                ),
            },
            check_results=[
                _counts_equal_records(counts, records, opened),
                _records_verify(problems, records),
            ],
        )

    return [lineage_index]


def _counted(database: Index) -> dict[str, int]:
    return {
        name: int(database.query(f"SELECT count(*) FROM {name}").rows[0][0])
        for name in ("artifacts", "inputs", "files", "shards", "checks")
    }


def _counts_equal_records(
    counts: Mapping[str, int], records: Sequence[Record], store: Store
) -> dg.AssetCheckResult:
    stated = {
        "artifacts": len(records),
        "inputs": sum(len(record.inputs) for record in records),
        "files": sum(
            len(record.files) + len(record.run_files) + (record.manifest is not None) for record in records
        ),
        "checks": sum(len(store.findings(record)) for record in records),
    }
    differing = [
        f"{counts[name]} {name}, {stated[name]} in the records"
        for name in stated
        if stated[name] != counts[name]
    ]
    return dg.AssetCheckResult(
        check_name="counts_equal_records",
        passed=not differing,
        description="; ".join(differing) or "as many of everything as the records have",
        metadata={"indexed": counts["artifacts"], "records": len(records)},
    )


def _records_verify(problems: Sequence[str], records: Sequence[Record]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="records_verify",
        passed=not problems,
        description=(
            f"{'; '.join(problems[:5])}. Remove the version and materialise the asset again"
            if problems
            else f"{len(records)} records and their files verify"
        ),
        metadata={"problems": len(problems)},
    )
