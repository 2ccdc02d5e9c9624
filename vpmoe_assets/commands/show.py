"""`vpmoe show`: all that is known of one artifact."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
)
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from vpmoe_assets.lineage.graph import Line
    from vpmoe_assets.lineage.remarks import Remark


@click.command()
@click.argument("asset")
@experiment_option
@click.option("--sources", is_flag=True, help="List the code that decides its bytes, file by file.")
@json_option
def show(asset: str, experiment: str | None, sources: bool, as_json: bool) -> None:
    """Show the record of one artifact: what it is, how it was made, and the tree of what it came from.

    \b
    Examples:
      vpmoe show synth_kd_v1
      vpmoe show vpmoe_stage1@20260131.2-0a1b2c3d --json
      vpmoe show vpmoe_stage1 --sources          # as recorded, and which files say another thing now
      vpmoe show vpmoe_stage1@now --sources      # as the code is now, published or not
    """  # noqa: D301
    if sources:
        from vpmoe_assets.commands.sources import show_sources

        show_sources(asset, experiment, as_json=as_json)
        return
    from vpmoe_assets.codebase.toolchain import toolchain_difference, toolchain_note
    from vpmoe_assets.lineage.adoption import is_adopted
    from vpmoe_assets.lineage.attestation import signature_line, signed
    from vpmoe_assets.lineage.graph import ancestors
    from vpmoe_assets.lineage.remarks import Remarks

    store = open_store()
    record = find_record(store, *asset_named(asset, experiment))
    lines = list(ancestors(store, record).tree())
    remarks = Remarks(store)
    if as_json:
        print_json(
            {
                "record": record.to_dict() | {"record_digest": record.record_digest},
                "directory": str(store.directory(record)),
                "checks": [dataclasses.asdict(finding) for finding in store.findings(record)],
                "remarks": [remark.to_dict() for remark in remarks.about(record)],
                "ancestry": [_node(line, remarks.on(record.experiment, line.reference)) for line in lines],
            }
        )
        return
    code, environment = record.code, record.environment
    packages = environment.get("packages") or {}
    facts = {
        "asset": f"{record.experiment}/{record.asset}",
        "version": f"{record.version} (sequence {record.sequence})",
        "digest": record.digest,
        "record": record.record_digest,
        "fingerprint": record.fingerprint,
        "directory": store.directory(record),
        "payload": f"{len(record.files)} files, {human_bytes(record.size)}",
        "published": record.published_utc,
        "ran": f"{record.started_utc} to {record.finished_utc}",
        "code": code.git_sha
        + (" with uncommitted changes" if code.git_dirty else "")
        + (", which adopted it; what made it is not known" if is_adopted(record) else ""),
        "execution": " ".join(f"{key}={value}" for key, value in sorted(record.execution.items())),
        "environment": f"python {environment.get('python')}, torch {packages.get('torch')}, "
        f"host {environment.get('host')}",
        "toolchain": toolchain_note(toolchain_difference(environment)),
        "command": " ".join(record.command),
        "run": record.dagster_run_id,
        "seed": record.seed,
    }
    for name, value in facts.items():
        if value not in (None, ""):
            click.echo(f"{name:<12} {value}")
    if found := store.findings(record):
        click.echo("\nchecks")
        for finding in found:
            state = f"{finding.outcome}, blocks" if finding.blocks else finding.outcome
            version = f" (version {finding.version[:12]})" if finding.version else ""
            said = f": {finding.reason}" if finding.reason else ""
            click.echo(f"  {state:<20} {finding.check}{version}{said}")
    if record.metrics:
        click.echo("\nmetrics")
        for name, value in sorted(record.metrics.items()):
            click.echo(f"  {name} = {value}")
    said_of_it = [remark.line() for remark in remarks.own(record)]
    said_of_it += [signature_line(each) for each in signed(store.statements.about(record))]
    if said_of_it:
        click.echo("\nsaid of it")
        for said in said_of_it:
            click.echo(f"  {said}")
    click.echo("\nancestry")
    for line in lines:
        click.echo("  " + _line(line))
        if (beside := remarks.on(record.experiment, line.reference)) is not None:
            click.echo("  " + "   " * line.depth + f"! {beside.line()}")


def _node(line: "Line", remark: "Remark | None") -> dict[str, Any]:
    return {
        "depth": line.depth,
        **line.reference.model_dump(),
        "remark": remark and remark.to_dict(),
        "present": line.node.state == "present",
        "repeated": line.repeated,
    }


def _line(line: "Line") -> str:
    reference = line.reference
    role = f" as {reference.role}" if reference.role not in ("self", reference.asset) else ""
    note = "" if line.node.state == "present" else "  NOT IN THE STORE"
    if line.repeated:
        note += "  (see above)"
    stem = "   " * (line.depth - 1) + "└─ " if line.depth else ""
    return f"{stem}{reference.asset}@{reference.version}  {reference.digest[:8]}{role}{note}"
