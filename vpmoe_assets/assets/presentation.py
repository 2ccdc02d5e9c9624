"""What assets tell Dagster beside what `vpmoe_assets.events` says of every record."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.step import records_key
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Record


def record_written(experiment: Experiment, record: Record) -> dg.AssetMaterialization:
    """Return the event by which Dagster sees that whatever was said of all records is out of date."""
    return dg.AssetMaterialization(
        records_key(experiment),
        description=version_name(record),
        tags={"dagster/data_version": record.record_digest},
    )


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    """Return rows as a table; all rows have the same keys."""
    return dg.MetadataValue.table(records=[dg.TableRecord(dict(row)) for row in rows])
