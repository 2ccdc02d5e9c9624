"""What the UI shows of a record: the same entries for every asset, what people look for first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from vpmoe_assets.browse.links import page_url
from vpmoe_assets.codebase.toolchain import toolchain_difference, toolchain_note
from vpmoe_assets.lineage.graph import ancestors
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.remarks import Adopted, Remarks
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.store import Store

CODE_VERSION_DIGITS = 16
"""Of a code version, as Dagster is told it."""


def record_metadata(
    record: Record,
    directory: Path,
    store: Store,
    *,
    reused: bool,
    special: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the metadata of a materialisation: its page, numbers and plots first, identity after them.

    Args:
        record: Of the version.
        directory: Of the version.
        store: It lies in.
        reused: Whether it had been made before.
        special: What this kind of asset shows beyond what all do: plots, tables, the ladder.
    """
    shown: dict[str, Any] = {"page": dg.MetadataValue.url(page_url(record))}
    remarks = Remarks(store).about(record)
    for name, said in (
        ("adopted", [remark for remark in remarks if isinstance(remark, Adopted)]),
        ("accepted", [remark for remark in remarks if not isinstance(remark, Adopted)]),
    ):
        if said:
            shown[name] = dg.MetadataValue.md("\n".join(f"- {remark.line()}" for remark in said))
    shown |= {name: _number(value) for name, value in record.metrics.items() if value is not None}
    shown |= special or {}
    shown |= {
        "provenance": dg.MetadataValue.md(provenance_tree(store, record)),
        "version": record.version,
        "reused": dg.MetadataValue.bool(reused),
        "size_bytes": dg.MetadataValue.int(record.size),
        "code": f"{record.code.git_sha[:12]}{' (dirty)' if record.code.git_dirty else ''}",
        "recipe": dg.MetadataValue.json(record.recipe),
        "execution": dg.MetadataValue.json(record.execution),
        "digest": record.digest,
        "record_digest": record.record_digest,
        "fingerprint": record.fingerprint,
        "record": dg.MetadataValue.path(directory / RECORD_NAME),
        "payload": dg.MetadataValue.path(directory / "payload"),
        "dagster/uri": dg.MetadataValue.url((directory / "payload").as_uri()),
    }
    if differing := toolchain_difference(record.environment):
        shown["toolchain"] = toolchain_note(differing)
    return shown


def finding_metadata(finding: Finding) -> dict[str, Any]:
    """Return what the UI shows of a check's last word beside the word itself."""
    return {
        **finding.metadata,
        "outcome": finding.outcome,
        "check_version": finding.version or "of the earlier schema",
    }


def provenance_tree(store: Store, record: Record) -> str:
    """Return the ancestry of a record as a nested markdown list, each with a link to its page."""
    lines = []
    remarks = Remarks(store)
    for line in ancestors(store, record).tree():
        note = "" if line.node.state == "present" else " — **no longer in the store**"
        if line.repeated:
            note = " (above)"
        indent, reference = "  " * line.depth, line.reference
        there = line.node.state == "present"
        name = f"[{reference.asset}]({page_url(line.node)})" if there else f"`{reference.asset}`"
        lines.append(f"{indent}- {name} {reference.version} · {reference.digest[:12]}{note}")
        beside = remarks.own(record) if line.depth == 0 else [remarks.on(record.experiment, reference)]
        lines += [f"{indent}  - **{remark.line()}**" for remark in beside if remark is not None]
    return "\n".join(lines)


def _number(value: object) -> Any:
    if isinstance(value, bool):
        return dg.MetadataValue.bool(value)
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    if isinstance(value, float):
        return dg.MetadataValue.float(value)
    return dg.MetadataValue.text(str(value))
