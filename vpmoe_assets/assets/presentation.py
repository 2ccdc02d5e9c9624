"""What the UI shows of a record: the same entries for every asset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.step import records_key
from vpmoe_assets.codebase.toolchain import toolchain_difference, toolchain_note
from vpmoe_assets.lineage.graph import ancestors
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.store import Store


def record_metadata(record: Record, directory: Path, store: Store, *, reused: bool) -> dict[str, Any]:
    """Return the common metadata of a materialisation: identity, place, provenance, numbers for plots.

    Args:
        record: Of the version.
        directory: Of the version.
        store: It lies in.
        reused: Whether it had been made before.
    """
    shown: dict[str, Any] = {
        "dagster/uri": dg.MetadataValue.url((directory / "payload").as_uri()),
        "version": record.version,
        "reused": dg.MetadataValue.bool(reused),
        "digest": record.digest,
        "record_digest": record.record_digest,
        "fingerprint": record.fingerprint,
        "record": dg.MetadataValue.path(directory / RECORD_NAME),
        "payload": dg.MetadataValue.path(directory / "payload"),
        "size_bytes": dg.MetadataValue.int(record.size),
        "provenance": dg.MetadataValue.md(provenance_tree(store, record)),
        "code": f"{record.code.git_sha[:12]}{' (dirty)' if record.code.git_dirty else ''}",
        "recipe": dg.MetadataValue.json(record.recipe),
        "execution": dg.MetadataValue.json(record.execution),
    }
    if differing := toolchain_difference(record.environment):
        shown["toolchain"] = toolchain_note(differing)
    if remarks := Remarks(store).about(record):
        shown["accepted"] = dg.MetadataValue.md("\n".join(f"- {remark.line()}" for remark in remarks))
    for name, value in record.metrics.items():
        if isinstance(value, bool):
            shown[name] = dg.MetadataValue.bool(value)
        elif isinstance(value, int):
            shown[name] = dg.MetadataValue.int(value)
        elif isinstance(value, float):
            shown[name] = dg.MetadataValue.float(value)
        elif value is not None:
            shown[name] = dg.MetadataValue.text(value)
    return shown


def record_written(experiment: Experiment, record: Record) -> dg.AssetMaterialization:
    """Return the event by which Dagster sees that whatever was said of all records is out of date."""
    return dg.AssetMaterialization(
        records_key(experiment),
        description=version_name(record),
        tags={"dagster/data_version": record.record_digest},
    )


def provenance_tree(store: Store, record: Record) -> str:
    """Return the ancestry of a record as a nested markdown list."""
    lines = []
    remarks = Remarks(store)
    for line in ancestors(store, record).tree():
        note = "" if line.node.state == "present" else " — **no longer in the store**"
        if line.repeated:
            note = " (above)"
        indent, reference = "  " * line.depth, line.reference
        lines.append(f"{indent}- `{reference.asset}` {reference.version} · {reference.digest[:12]}{note}")
        beside = remarks.own(record) if line.depth == 0 else [remarks.on(record.experiment, reference)]
        lines += [f"{indent}  - **{remark.line()}**" for remark in beside if remark is not None]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    """Return rows as a table; all rows have the same keys."""
    return dg.MetadataValue.table(records=[dg.TableRecord(dict(row)) for row in rows])
