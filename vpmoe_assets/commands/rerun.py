"""`vpmoe rerun`: an artifact made again from its record, and what came of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.rerunning import Outcome, Present
    from vpmoe_assets.lineage.statements import Statement
    from vpmoe_assets.lineage.store import Store

NOT_REPRODUCED = 3
"""Exit code where something else came out."""


@click.command()
@click.argument("asset")
@experiment_option
@click.option(
    "--now",
    is_flag=True,
    help="With present code and experiment in the place of the record's own: proves what was accepted, or "
    "voids it, and says what an edit changes first.",
)
@click.option(
    "--env", metavar="DIR", type=click.Path(path_type=Path), help="Run in this virtual environment."
)
@click.option("--anyway", is_flag=True, help="Run although other packages are installed than there were.")
@click.option(
    "--into", metavar="DIR", type=click.Path(path_type=Path), help="Make it there, and leave it there."
)
@click.option("--keep", is_flag=True, help="Leave what was made where it is, also where it is the same.")
@json_option
def rerun(
    asset: str,
    experiment: str | None,
    now: bool,
    env: Path | None,
    anyway: bool,
    into: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Make an artifact again: same code, environment, recipe and inputs; then compare every byte.

    The code is laid out from the snapshot that the record names, inputs are those of the record, by digest,
    and what is made lies in a store of its own, below .work/reruns, until it turns out to be the same. Other
    packages than were installed then are named, and refused without --anyway. What came of it is stated about
    the record: reproduced, or not_reproduced with the first step, file and tensor that differ. An interrupted
    one goes on where it was. Exit code 0: reproduced; 3: not; 1: it could not be tried.

    \b
    Examples:
      vpmoe rerun synth_kd_v1
      vpmoe rerun vpmoe_stage1@20260131.1-1a2b3c4d --into /scratch/again
      vpmoe rerun vpmoe_stage1 --now
      vpmoe rerun vpdense_80 --env ~/other/.venv --anyway --json
    """  # noqa: D301
    from vpmoe_assets.lineage import locks
    from vpmoe_assets.lineage.acceptance import settle_acceptances
    from vpmoe_assets.lineage.own_store import OwnStore
    from vpmoe_assets.lineage.rerunning import kept_packages, original_of, state
    from vpmoe_assets.lineage.rerunning import rerun as made_again
    from vpmoe_assets.lineage.surroundings import Surroundings

    store = open_store()
    found = find_record(store, *asset_named(asset, experiment))
    record = original_of(store, found)
    packages = kept_packages(store, record)
    surroundings = Surroundings.here() if env is None else Surroundings.of(env)
    differing = surroundings.differences(record, packages)
    _name_differences(record, differing, anyway)
    for remark in surroundings.remarks(record, packages):
        click.echo(f"note: {remark}", err=True)
    present = _present(experiment) if now else None
    name = f"{record.experiment}-{record.asset}-{record.record_digest[:8]}{'-now' if now else ''}"
    root = (into or store.root / ".work" / "reruns" / name).absolute()
    with locks.hold(store.root / ".work" / ".locks" / f"rerun-{name}.lock", f"a rerun of {asset}", 0.0):
        own = OwnStore.at(root)
        again = "goes on" if own.resumed else "is made again"
        click.echo(f"{record.asset}@{record.version} {again} in {root}; log: {own.log}", err=True)
        outcome = made_again(
            store,
            record,
            own,
            python=surroundings.python,
            present=present,
            log=lambda message: click.echo(message, err=True),
        )
        statements = [said] if (said := state(store, outcome, differing)) else []
        statements += settle_acceptances(store, outcome.made)
        own.finish()
        if kept := (keep or into is not None or not outcome.reproduced):
            click.echo(f"what was made is {own.store.directory(outcome.made)}", err=True)
        else:
            own.remove()
    place = own.store.directory(outcome.made) if kept else None
    _report(store, outcome, differing, statements, place, as_json)


def _name_differences(record: "Record", differing: list[str], anyway: bool) -> None:
    if not differing:
        return
    shown = "; ".join(differing[:10]) + (f"; and {len(differing) - 10} more" if len(differing) > 10 else "")
    if not anyway:
        raise click.ClickException(
            f"{record.asset}@{record.version} was made with other packages: {shown}. Install the locked "
            f"environment of commit {record.code.git_sha[:12]} and name it with --env DIR, or run it --anyway"
        )
    click.echo(f"installed otherwise: {shown}", err=True)


def _present(experiment: str | None) -> "Present":
    """Return present code and experiment."""
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.commands.common import user_errors
    from vpmoe_assets.lineage.rerunning import Present

    with user_errors(ConfigError):
        return Present(current(), load_experiment(experiment or project.experiment_name()).written)


def _report(
    store: "Store",
    outcome: "Outcome",
    differing: list[str],
    statements: "list[Statement]",
    place: Path | None,
    as_json: bool,
) -> None:
    record, made = outcome.record, outcome.made
    if as_json:
        answer: dict[str, Any] = {
            "artifact": f"{record.experiment}/{record.asset}@{record.version}",
            "reproduced": outcome.reproduced,
            "digest": record.digest,
            "made": made.digest,
            "same_fingerprint": outcome.same_identity,
            "environment": differing,
            "difference": outcome.difference(),
            "failed_checks": list(outcome.failed),
            "seconds": round(outcome.seconds, 3),
            "directory": place and str(place),
            "statements": [{"kind": each.kind, "id": each.id, "about": each.artifact} for each in statements],
        }
        print_json(answer)
    else:
        if not outcome.same_identity:
            for line in outcome.identity.lines() or ["its inputs from outside the store are others"]:
                click.echo(f"made otherwise: {line}")
        if outcome.reproduced:
            click.echo(
                f"reproduced: {record.asset}@{record.version}, {len(record.files)} files, digest "
                f"{record.digest} ({outcome.seconds:.0f} s)"
            )
        else:
            click.echo(f"NOT reproduced: {record.asset}@{record.version} has digest {record.digest}")
            click.echo(f"{'what was made':<14} {made.digest} ({outcome.seconds:.0f} s)")
            if outcome.step is not None:
                click.echo(f"{'first step':<14} {outcome.step}")
            if outcome.file is not None:
                click.echo(f"{'first file':<14} {outcome.file}")
        if outcome.failed:
            click.echo(f"{'failed checks':<14} {', '.join(outcome.failed)}")
        for each in statements:
            click.echo(f"stated {each.kind} about {each.artifact} ({each.id[:12]})")
    if not outcome.reproduced:
        sys.exit(NOT_REPRODUCED)
