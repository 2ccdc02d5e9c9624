"""`vpmoe accept`: a person states that present code makes what a record's own made, or lets a check pass."""

from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_in_force,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.statements import Statement
    from vpmoe_assets.lineage.store import Store


@click.command()
@click.argument("asset", required=False)
@experiment_option
@click.option("--because", metavar="TEXT", default="", help="Why; every view of lineage shows it.")
@click.option(
    "--recipe", "recipe", multiple=True, metavar="KEY", help="A key of the recipe whose new value is covered."
)
@click.option(
    "--package", "packages", multiple=True, metavar="NAME", help="A package whose new release is covered."
)
@click.option(
    "--check", metavar="NAME", help="Let this check pass, whose evidence is gone, without a verdict."
)
@click.option("--list", "listing", is_flag=True, help="List what was accepted, and what became of it.")
@click.option(
    "--withdraw", metavar="STATEMENT", help="End an acceptance; the first digits of its id will do."
)
@json_option
def accept(
    asset: str | None,
    experiment: str | None,
    because: str,
    recipe: tuple[str, ...],
    packages: tuple[str, ...],
    check: str | None,
    listing: bool,
    withdraw: str | None,
    as_json: bool,
) -> None:
    """State that present code and recipe make what ASSET was made with, so that it is reused.

    A harmless refactoring need not cost a training. The statement binds one record to the code, recipe and
    packages of now, with equal inputs. Keys of the recipe and packages that differ are covered only where
    each is named. Every view of lineage shows who said so, why, and the difference. Making the artifact again
    proves it, or voids it.

    \b
    Examples:
      vpmoe accept vpmoe_stage1 --because "a variable was renamed"
      vpmoe accept vpmoe_stage1 --because "logs more often" --recipe training.log_interval
      vpmoe accept vpmoe_stage1 --check resume_drift --because "I saw it pass"
      vpmoe accept --list
      vpmoe accept --withdraw 1a2b3c4d --because "it was no mere renaming"
    """  # noqa: D301
    if bool(asset) + listing + bool(withdraw) != 1:
        raise click.UsageError("name an ASSET, or give one of --list and --withdraw")
    if check and (recipe or packages):
        raise click.UsageError("--check lets a check pass; --recipe and --package have no part in it")
    store = open_store()
    if listing:
        _list(store, experiment_in_force(experiment), as_json)
    elif withdraw:
        _withdraw(store, withdraw, because, as_json)
    elif asset and check:
        from vpmoe_assets.lineage.acceptance import waiving

        record = find_record(store, *asset_named(asset, experiment))
        _say(store, waiving(record, store.findings(record), check, reason=because), as_json)
    elif asset:
        _accept(store, asset, experiment, because, recipe, packages, as_json)


def _accept(
    store: "Store",
    asset: str,
    experiment: str | None,
    because: str,
    recipe: tuple[str, ...],
    packages: tuple[str, ...],
    as_json: bool,
) -> None:
    from vpmoe_assets import project
    from vpmoe_assets.commands.present import load_steps, present_identity, step_of
    from vpmoe_assets.lineage.acceptance import (
        Named,
        acceptances_of,
        accepting,
        has_earlier_fingerprint,
    )
    from vpmoe_assets.lineage.adoption import is_adopted
    from vpmoe_assets.lineage.difference import Difference

    place, name, version = asset_named(asset, experiment)
    named = asset.partition("@")[0].rpartition("/")[0] or experiment or project.experiment_name()
    record = find_record(store, place, name, version)
    if has_earlier_fingerprint(record):
        raise click.ClickException(
            f"{name}@{record.version} is of an earlier schema, whose fingerprint covers other things: "
            f"`vpmoe upgrade {name}` says what can be shown of it"
        )
    adopted = is_adopted(record)
    shown_by = {} if adopted else {"snapshot": _snapshot(store, record)}
    loaded, steps = load_steps(named)
    if loaded != record.experiment:
        raise click.ClickException(
            f"{name}@{record.version} is of experiment {record.experiment}, the one in force is {loaded}; an "
            "acceptance holds in its own experiment alone"
        )
    present = present_identity(step_of(steps, loaded, name), store, loaded)
    if isinstance(present, list):
        raise click.ClickException(
            f"{name}: {', '.join(present)} was never published; nothing to compare with"
        )
    fingerprint, payload = present
    _refuse_made(store, record, fingerprint)
    statement = accepting(
        record,
        payload,
        acceptances_of(record, store.statements),
        reason=because,
        shown_by=shown_by,
        difference=Difference() if adopted else None,
        named=Named(recipe, packages),
        unknown=["what made it, and of what: it was adopted"] if adopted else (),
    )
    _say(store, statement, as_json)


def _snapshot(store: "Store", record: "Record") -> str:
    """Return the snapshot that shows what code a record was made with, once it was found intact."""
    from vpmoe_assets.lineage.errors import LineageError
    from vpmoe_assets.lineage.objects import ObjectStore

    name = f"{record.asset}@{record.version}"
    if record.objects.sources is None:
        raise click.ClickException(
            f"{name} names no snapshot of its sources, so the difference cannot be shown"
        )
    try:
        ObjectStore(store.root).get(record.objects.sources)
    except LineageError as error:
        raise click.ClickException(
            f"{name}: the snapshot that shows the difference is gone: {error}"
        ) from error
    return record.objects.sources


def _refuse_made(store: "Store", record: "Record", fingerprint: str) -> None:
    """Refuse to say of an artifact what one that was really made with present code says already.

    The ledger knows those that were removed since, and those of other experiments.
    """
    from vpmoe_assets.lineage.layout import version_name

    if record.fingerprint == fingerprint:
        return
    for entry in store.ledger.of_fingerprint(fingerprint):
        other = store.ledger.get(entry.record_digest)
        if other is not None and other.asset == record.asset and other.digest != record.digest:
            raise click.ClickException(
                f"{record.asset}@{record.version}: {version_name(other)} was made "
                f"with present code and recipe, and is different (digest {other.digest[:12]}, this one's is "
                f"{record.digest[:12]})"
            )
    for head in store.scan(record.experiment, record.asset)[0]:
        if head.fingerprint == fingerprint:
            raise click.ClickException(
                f"{record.asset}@{head.version} was made with present code and recipe, and is the same; that "
                "one is reused"
            )


def _withdraw(store: "Store", prefix: str, because: str, as_json: bool) -> None:
    from vpmoe_assets.lineage.acceptance import Acceptance, acceptances, withdrawing
    from vpmoe_assets.lineage.layout import named_version
    from vpmoe_assets.lineage.remarks import Remarks

    found = [
        statement
        for statement in store.statements.all()
        if statement.kind in ("accepted", "waived") and statement.id.startswith(prefix.lower())
    ]
    if len(found) != 1:
        what = "no statement" if not found else f"{len(found)} statements"
        raise click.ClickException(f"{what} of acceptance begins with {prefix!r}; `vpmoe accept --list`")
    (said,) = found
    experiment, asset, _ = named_version(said.artifact)
    everything = store.statements.about_digest(experiment, asset, said.record)
    ended = next((s for s in everything if s.kind == "withdrawn" and s.body["statement"] == said.id), None)
    known = {each.statement.id: each for each in acceptances(everything)}
    statement = withdrawing(known.get(said.id, Acceptance(said, ended)), reason=because)
    meanwhile = [
        f"{record.asset}@{record.version}" for record in Remarks(store).made_under(experiment, said.id)
    ]
    _say(store, statement, as_json, made_meanwhile=meanwhile)
    if meanwhile and not as_json:
        click.echo(f"made meanwhile from it: {', '.join(meanwhile)}")


def _list(store: "Store", experiment: str, as_json: bool) -> None:
    from vpmoe_assets.lineage.acceptance import acceptances
    from vpmoe_assets.lineage.remarks import Remark

    rows: list[dict[str, Any]] = []
    for asset in store.statements.assets(experiment):
        for said in store.statements.of_asset(experiment, asset).values():
            withdrawn = {s.body["statement"] for s in said if s.kind == "withdrawn"}
            for found in acceptances(said):
                version = found.statement.artifact.rpartition("/")[2]
                remark = Remark(experiment, asset, version, found.statement.id, found, own=True)
                rows.append(_row(found.statement, "code and recipe", remark.state) | remark.to_dict())
            rows += [
                _row(s, f"check {s.body['check']}", "withdrawn" if s.id in withdrawn else "active")
                for s in said
                if s.kind == "waived"
            ]
    rows.sort(key=lambda row: row["time"])
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"nothing was accepted in experiment {experiment}")
    else:
        print_table(
            ("STATEMENT", "ARTIFACT", "ACCEPTED", "BY", "ON", "STATE", "BECAUSE"),
            [
                (
                    row["statement"][:12],
                    row["artifact"],
                    row["what"],
                    row["author"],
                    row["time"][:16],
                    row["state"],
                    row["reason"],
                )
                for row in rows
            ],
        )


def _row(statement: "Statement", what: str, state: str) -> dict[str, Any]:
    return {
        "statement": statement.id,
        "artifact": statement.artifact,
        "what": what,
        "author": statement.author,
        "time": statement.time,
        "state": state,
        "reason": statement.reason,
    }


def _say(store: "Store", statement: "Statement", as_json: bool, **more: Any) -> None:
    written = store.statements.append(statement)
    if as_json:
        print_json({**written.model_dump(by_alias=True), "id": written.id, **more})
        return
    click.echo(
        f"{written.kind} {written.artifact} ({written.id[:12]}), by {written.author}: {written.reason}"
    )
    if written.kind == "accepted":
        from vpmoe_assets.lineage.difference import Difference

        for line in Difference.from_json(written.body["difference"]).lines():
            click.echo(f"  {line}")
