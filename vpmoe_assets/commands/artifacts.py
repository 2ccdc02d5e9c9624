"""`vpmoe ls`, `show`, `path`, `verify`: read the store itself, no index needed."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_in_force,
    experiment_option,
    human_bytes,
    json_option,
    open_store,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.graph import Node
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.store import Store


@click.command()
@experiment_option
@json_option
def ls(experiment: str | None, as_json: bool) -> None:
    """List the latest version of every asset.

    STATE says whether it may be built on: blocked by a check, damaged (a file is missing or has another size;
    `vpmoe verify` reads the contents too), or stale because something it came from has a newer version.

    \b
    Examples:
      vpmoe ls
      vpmoe ls -e full --json
    """  # noqa: D301
    from vpmoe_assets.lineage.graph import stale_reasons

    store, name = open_store(), experiment_in_force(experiment)
    latest: dict[str, Record] = {}
    unreadable: dict[str, str] = {}
    for asset in store.assets(name):
        records, damaged = store.scan(name, asset)
        if records:
            latest[asset] = records[-1]
        for broken in damaged:
            unreadable[f"{asset}@{broken.version}"] = str(broken.error)
    stale = stale_reasons(latest)
    rows = [_summary(store, record, stale.get(asset)) for asset, record in latest.items()]
    if as_json:
        print_json({"experiment": name, "artifacts": rows, "unreadable": unreadable})
        return
    if not rows and not unreadable:
        click.echo(f"no artifacts of experiment {name} in {store.root}")
        return
    print_table(
        ("ASSET", "VERSION", "DIGEST", "SIZE", "PUBLISHED", "CHECKS", "STATE"),
        [
            (
                r["asset"],
                r["version"],
                r["digest"][:8],
                human_bytes(r["bytes"]),
                r["published_utc"][:16],
                f"{r['checks_passed']}/{r['checks']}" if r["checks"] else "-",
                r["state"],
            )
            for r in rows
        ],
        right=("SIZE",),
    )
    for where, error in unreadable.items():
        click.echo(f"unreadable: {where}: {error}", err=True)


@click.command()
@click.argument("asset")
@experiment_option
@json_option
def show(asset: str, experiment: str | None, as_json: bool) -> None:
    """Show the record of one artifact: what it is, how it was made, and the tree of what it came from.

    \b
    Examples:
      vpmoe show synth_kd_v1
      vpmoe show vpmoe_stage1@20260131.2-0a1b2c3d --json
    """  # noqa: D301
    from vpmoe_assets.lineage.graph import ancestry

    store = open_store()
    record = _find(store, *asset_named(asset, experiment))
    nodes = list(ancestry(store, record))
    if as_json:
        print_json(
            {
                "record": record.to_dict() | {"record_digest": record.record_digest},
                "directory": str(store.directory(record)),
                "checks": [dataclasses.asdict(finding) for finding in store.findings(record)],
                "ancestry": [_node(node) for node in nodes],
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
        "code": code.git_sha + (" with uncommitted changes" if code.git_dirty else ""),
        "execution": " ".join(f"{key}={value}" for key, value in sorted(record.execution.items())),
        "environment": f"python {environment.get('python')}, torch {packages.get('torch')}, "
        f"host {environment.get('host')}",
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
            said = f": {finding.description}" if finding.description else ""
            click.echo(f"  {state:<20} {finding.check}{said}")
    if record.metrics:
        click.echo("\nmetrics")
        for name, value in sorted(record.metrics.items()):
            click.echo(f"  {name} = {value}")
    click.echo("\nancestry")
    for node in nodes:
        click.echo("  " + _line(node))


@click.command()
@click.argument("asset")
@experiment_option
@click.option("--unchecked", is_flag=True, help="Do not look whether it is intact and not blocked.")
@json_option
def path(asset: str, experiment: str | None, unchecked: bool, as_json: bool) -> None:
    """Print the payload directory of an artifact; refuses one that is damaged or blocked by its checks.

    \b
    Examples:
      ls "$(vpmoe path synth_kd_v1)"
      python -m trainer generate --checkpoint "$(vpmoe path vpmoe_stage1)"
    """  # noqa: D301
    store = open_store()
    name = asset_named(asset, experiment)
    record = _find(store, *name) if unchecked else store.require(*name)
    if as_json:
        print_json({"path": str(store.payload(record)), "version": record.version, "digest": record.digest})
    else:
        click.echo(str(store.payload(record)))


@click.command()
@click.argument("asset", required=False)
@experiment_option
@click.option("--quick", is_flag=True, help="Compare names and sizes only; read no contents.")
@json_option
def verify(asset: str | None, experiment: str | None, quick: bool, as_json: bool) -> None:
    """Read every byte of an artifact and of all it came from, and compare it with the records.

    Without ASSET, every version of the experiment. Names each bad file; exit code 1 if there is one.

    \b
    Examples:
      vpmoe verify
      vpmoe verify synth_kd_v1
      vpmoe verify --json | jq -r '.problems[].path'
    """  # noqa: D301
    from vpmoe_assets.lineage.integrity import Problem
    from vpmoe_assets.lineage.verify import verify_record

    store = open_store()
    problems: list[Problem] = []
    if asset:
        records = [_find(store, *asset_named(asset, experiment))]
    else:
        name = experiment_in_force(experiment)
        records = list(store.records(name))
        problems += [
            Problem("record", f"{d.experiment}/{d.asset}/{d.version}", ".artifact.json", str(d.error))
            for d in store.damaged(name)
        ]
    seen: set[str] = set()
    for record in records:
        problems += verify_record(store, record, deep=not quick, seen=seen)
    if as_json:
        print_json({"artifacts": len(seen), "problems": [problem.to_dict() for problem in problems]})
    else:
        for problem in problems:
            click.echo(str(problem))
        found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "all intact"
        click.echo(f"{len(seen)} artifact{'s' * (len(seen) != 1)} verified: {found}", err=bool(problems))
    if problems:
        sys.exit(1)


def _find(store: "Store", experiment: str, asset: str, version: str | None) -> "Record":
    from vpmoe_assets.lineage.errors import ArtifactMissing

    record = store.find(experiment, asset, version)
    if record is None:
        known = (
            ", ".join(store.versions(experiment, asset) if version else store.assets(experiment)) or "none"
        )
        wanted = f"{experiment}/{asset}" + (f"@{version}" if version else "")
        raise ArtifactMissing(f"{wanted} is not in {store.root}; there is: {known}")
    return record


def _summary(store: "Store", record: "Record", stale: str | None) -> dict[str, Any]:
    from vpmoe_assets.lineage.integrity import payload_problems

    damage = payload_problems(store.directory(record), record, None)
    found = store.findings(record)
    blocking = [finding for finding in found if finding.blocks]
    state = "ok"
    if damage:
        state = f"damaged: {damage[0].path} {damage[0].message}"
    elif blocking:
        state = f"blocked: {blocking[0].check}"
    elif stale:
        state = f"stale: {stale}"
    return {
        "asset": record.asset,
        "version": record.version,
        "sequence": record.sequence,
        "digest": record.digest,
        "bytes": record.size,
        "published_utc": record.published_utc,
        "checks": len(found),
        "checks_passed": sum(finding.outcome == "passed" for finding in found),
        "stale": stale,
        "state": state,
    }


def _node(node: "Node") -> dict[str, Any]:
    return {
        "depth": node.depth,
        **node.reference.model_dump(),
        "present": node.record is not None,
        "repeated": node.repeated,
    }


def _line(node: "Node") -> str:
    reference = node.reference
    role = f" as {reference.role}" if reference.role not in ("self", reference.asset) else ""
    note = "" if node.record else "  NOT IN THE STORE"
    if node.repeated:
        note += "  (see above)"
    stem = "   " * (node.depth - 1) + "└─ " if node.depth else ""
    return f"{stem}{reference.asset}@{reference.version}  {reference.digest[:8]}{role}{note}"
