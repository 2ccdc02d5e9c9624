"""`vpmoe ls`: the latest version of every asset, and where it stands."""

from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    human_bytes,
    json_option,
    open_store,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpmoe_assets.lineage.heads import Head
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.remarks import Remark
    from vpmoe_assets.lineage.store import Store


@click.command()
@experiment_option
@json_option
def ls(experiment: str | None, as_json: bool) -> None:
    """List the latest version of every asset.

    STATE says whether it may be built on: blocked by a check, damaged (a file is missing or has another size;
    `vpmoe verify` reads the contents too), or stale because something it came from has a newer version; and
    whether it counts, or was made from something that counts, because a person accepted it (`vpmoe accept`).

    \b
    Examples:
      vpmoe ls
      vpmoe ls -e full --json
    """  # noqa: D301
    from vpmoe_assets.lineage.graph import stale_reasons
    from vpmoe_assets.lineage.remarks import Remarks

    store, name = open_store(), experiment_in_force(experiment)
    latest: dict[str, Head] = {}
    unreadable: dict[str, str] = {}
    for asset in store.assets(name):
        heads, damaged = store.scan(name, asset)
        if heads:
            latest[asset] = heads[-1]
        for broken in damaged:
            unreadable[f"{asset}@{broken.version}"] = str(broken.error)
    stale = stale_reasons(latest)
    remarks = Remarks(store)
    rows = [
        _summary(store, record, stale.get(asset), remarks.about(record))
        for asset, record in ((asset, store.record(head)) for asset, head in latest.items())
    ]
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


def _summary(
    store: "Store", record: "Record", stale: str | None, remarks: "Sequence[Remark]"
) -> dict[str, Any]:
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
    # What nobody stands by any more counts first: the rest is for `vpmoe show`.
    told = [remark for remark in remarks if remark.void and not remark.own] or list(remarks[-1:])
    if told:
        state += f"; {told[0].short()}"
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
        "remarks": [remark.to_dict() for remark in remarks],
    }
