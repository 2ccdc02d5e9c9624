"""The index over all records, and the experiment's records verified against what was known of them."""

import contextlib
from collections.abc import Iterator, Sequence

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.produced import explained
from vpmoe_assets.assets.step import asset_key, catalogued, records_key
from vpmoe_assets.lineage.contents import Contents, make_up
from vpmoe_assets.lineage.errors import IndexCorruptError, IndexLockedError, RecordError
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.index import Index, records_digest
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import Look, Verification, verify_experiment
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.told import told_by_dagster


def lineage_assets(experiment: Experiment) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """Return the `lineage` group."""
    key = asset_key(experiment, "lineage_index")
    records = dg.AssetSpec(
        records_key(experiment),
        description=(
            "All records of the experiment: one `.artifact.json` for each version of each asset.\n\n"
            "Written by whatever publishes; each event here is a new record, and makes `lineage_index` stale."
        ),
        group_name="lineage",
        kinds={"json"},
        **catalogued(experiment),
    )

    # It depends on no asset, so that it runs where one failed, too, and after all of them by its priority.
    @dg.asset(
        key=key,
        deps=[records],
        group_name="lineage",
        kinds={"duckdb"},
        **catalogued(experiment),
        check_specs=[
            dg.AssetCheckSpec("counts_equal_records", asset=key, blocking=True),
            dg.AssetCheckSpec("records_verify", asset=key, blocking=True),
        ],
        op_tags={"dagster/priority": "-100"},
    )
    def lineage_index(
        context: dg.AssetExecutionContext, store: StoreResource, index: IndexResource
    ) -> dg.MaterializeResult:
        """The DuckDB index, and the records of this experiment verified.

        Artifacts are indexed as they are published, so a rung that failed is in it too; this asset makes up
        for what was missed. Before that it compares the records with what the index, the ledger, statements
        and Dagster's own events remember: one that was rewritten or is gone is named. Every file is held to
        its record; one that is unchanged by inode, size and times since it was last read is not read again
        (`vpmoe verify --deep` reads every byte). Ask the index with `vpmoe sql "SELECT * FROM ladder"`.
        """
        with explained("lineage_index"):
            return _indexed(experiment, context, store.open(), index.open())

    return [records, lineage_index]


def _indexed(
    experiment: Experiment, context: dg.AssetExecutionContext, opened: Store, database: Index
) -> dg.MaterializeResult:
    look = Look(
        opened.hasher, opened.states(), witnesses=lambda name: told_by_dagster(context.instance, name)
    )
    verified = verify_experiment(opened, database, experiment.name, look)
    records = list(_readable(opened, verified.heads))
    for note in verified.notes:
        context.log.info(f"note: {note}")
    if (missed := make_up(database, opened, experiment.name, records)) is not None:
        context.log.warning(missed)
    try:
        contents = Contents.of(database, experiment.name)
    except (IndexCorruptError, IndexLockedError) as error:
        totals, compared = {}, _not_compared(str(error))
    else:
        totals, compared = contents.totals(), _counts_equal_records(contents, records, opened)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(records_digest(each.record_digest for each in verified.heads)),
        metadata={
            **{name: dg.MetadataValue.int(count) for name, count in totals.items()},
            "index": dg.MetadataValue.path(database.path),
            "example": dg.MetadataValue.md('```\nvpmoe sql "SELECT asset, version, digest FROM latest"\n```'),
        },
        check_results=[compared, _records_verify(verified)],
    )


def _readable(store: Store, heads: Sequence[Head]) -> Iterator[Record]:
    for head in heads:
        with contextlib.suppress(FileNotFoundError, RecordError):  # reported where it was verified
            yield store.record(head)


def _counts_equal_records(contents: Contents, records: Sequence[Record], store: Store) -> dg.AssetCheckResult:
    differing = contents.differences(records, store)
    return dg.AssetCheckResult(
        check_name="counts_equal_records",
        passed=not differing,
        description="; ".join(differing[:5]) or "as many of everything as the records have",
        metadata={"indexed": contents.totals()["artifacts"], "records": len(records)},
    )


def _not_compared(why: str) -> dg.AssetCheckResult:
    """Return what is said where the index cannot be asked now: nobody's run ends for that."""
    return dg.AssetCheckResult(
        check_name="counts_equal_records",
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"not compared: {why}",
    )


def _records_verify(verified: Verification) -> dg.AssetCheckResult:
    problems = verified.problems
    return dg.AssetCheckResult(
        check_name="records_verify",
        passed=not problems,
        description=(
            f"{'; '.join(map(str, problems[:5]))}. `vpmoe verify` names all; what is materialised again "
            "and comes out the same is restored in its place"
            if problems
            else f"{len(verified.heads)} records and their files verify"
        ),
        metadata={"problems": len(problems), "notes": len(verified.notes)},
    )
