"""`vpmoe verify`: is everything still what was published?"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    asset_named,
    experiment_in_force,
    experiment_option,
    find_record,
    json_option,
    open_index,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from vpmoe_assets.events.auditing import EventAudit
    from vpmoe_assets.lineage.index import Index
    from vpmoe_assets.lineage.integrity import Problem
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.store import Store
    from vpmoe_assets.lineage.verify import Look, Verification

_MOST_NAMED = 5


@click.command()
@click.argument("asset", nargs=-1)
@experiment_option
@click.option("--quick", is_flag=True, help="Compare names and sizes only; read no contents.")
@click.option(
    "--deep",
    is_flag=True,
    help="Trust no cache: read every byte, and hold records, snapshots, ledger, index, statements, Dagster's "
    "events and verdicts of checks against each other.",
)
@click.option("--without-checks", is_flag=True, help="With --deep: run no check again.")
@click.option("--restart", is_flag=True, help="With --deep: do not go on where an interrupted one stopped.")
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False),
    metavar="PUBLIC.PEM",
    help="Every version has to be signed with the private key of this one (`vpmoe attest`).",
)
@json_option
def verify(
    asset: tuple[str, ...],
    experiment: str | None,
    quick: bool,
    deep: bool,
    without_checks: bool,
    restart: bool,
    key: str | None,
    as_json: bool,
) -> None:
    """Compare artifacts, and all they came from, with the records, and the records with who remembers them.

    Without ASSET, every version of the experiment. A file is read unless name, inode, size and times say
    that nothing wrote to it since it was last found intact; --deep reads every byte and believes nobody.
    Records are compared with what the index, the ledger and statements remember: one that was rewritten is
    named, and a version that is gone. Signatures are checked, and --key asks for one of each version. Names
    each bad file, then the link of the chain that is broken first and what was made from it. Exit code 0: all
    intact; 1: something is not as it was. A note is an explained difference.

    \b
    Examples:
      vpmoe verify
      vpmoe verify synth_kd_v1 vpdense_80
      vpmoe verify --deep vpmoe_stage1
      vpmoe verify vpmoe_stage1 --key public.pem
      vpmoe verify --json | jq -r '.problems[].path'
    """  # noqa: D301
    if deep and quick:
        raise click.ClickException("--quick reads no contents and --deep reads all; choose one")
    if (without_checks or restart) and not deep:
        raise click.ClickException(
            f"{'--without-checks' if without_checks else '--restart'} belongs to --deep; add that"
        )
    signer = None if key is None else _signer(key)
    store, index = open_store(), open_index()
    names = [asset_named(each, experiment) for each in asset]
    records = [find_record(store, *name) for name in names]
    concerned = list(dict.fromkeys(name for name, _, _ in names)) or [experiment_in_force(experiment)]
    with _look(store, concerned, experiment, asset, quick, deep, without_checks, restart) as (look, told):
        done = _verified(store, index, concerned[0], records, replace(look, key=signer))
        if deep:
            told += _memories(store, index, concerned, done, bool(records))
    _report(done, told, signer, as_json)


def _signer(key: str) -> str:
    """Return the sha256 by which signatures name a public key."""
    from vpmoe_assets.lineage.signing import Verifier

    return Verifier.of(Path(key).read_bytes(), key).key


def _verified(
    store: "Store", index: "Index", experiment: str, records: Sequence["Record"], look: "Look"
) -> "Verification":
    from vpmoe_assets.lineage.layout import version_name
    from vpmoe_assets.lineage.verify import Verification, verify_artifact, verify_experiment

    if not records:
        return verify_experiment(store, index, experiment, look)
    every = [verify_artifact(store, index, record, look) for record in records]
    heads = {version_name(head): head for done in every for head in done.heads}
    return Verification(
        list(heads.values()), list(dict.fromkeys(each for done in every for each in done.found))
    )


@contextlib.contextmanager
def _look(
    store: "Store",
    experiments: Sequence[str],
    experiment: str | None,
    assets: Sequence[str],
    quick: bool,
    deep: bool,
    without_checks: bool,
    restart: bool,
) -> Iterator[tuple["Look", list["Problem"]]]:
    """Yield how closely is looked at what, and what is to be said beside it."""
    from vpmoe_assets.lineage.verify import Look

    if quick:
        yield Look(None), []
        return
    if not deep:
        yield Look(store.hasher, store.states(min(len(os.sched_getaffinity(0)), 8))), []
        return
    from vpmoe_assets.lineage.journal import Journal
    from vpmoe_assets.lineage.record_audit import RecordAudit

    told: list[Problem] = []
    audits: list[Callable[[Record], Iterable[Problem]]] = [RecordAudit(store)]
    if not without_checks:
        audits += _checks(store, {name: _loaded_by(name, experiment) for name in experiments}, told)
    if (events := _events(experiments, told)) is not None:
        audits.append(events)
    with Journal.of(store.root, [*experiments, *assets], restart=restart) as journal:
        if journal.begun:
            click.echo(f"going on from a verification that was interrupted; {journal.begun}", err=True)
        yield (
            Look(
                journal,
                audit=lambda record: [each for audit in audits for each in audit(record)],
                witnesses=None if events is None else events.sightings,
            ),
            told,
        )
        if events is not None:
            told += [note for name in experiments for note in events.notes(name)]


def _loaded_by(name: str, option: str | None) -> str:
    """Return what an experiment is loaded by: the file in force where it is that one's, else its name."""
    given = option or project.experiment_name()
    return given if given.endswith(".toml") and experiment_in_force(given) == name else name


def _checks(
    store: "Store", experiments: Mapping[str, str], told: list["Problem"]
) -> "list[Callable[[Record], Iterable[Problem]]]":
    """Return what runs checks again: of each experiment that present code has, by what it is loaded."""
    from vpmoe_assets.checks.repeating import RepeatedChecks
    from vpmoe_assets.commands.present import load_location
    from vpmoe_assets.lineage.integrity import Problem

    found: dict[str, RepeatedChecks] = {}
    for name, loaded_by in experiments.items():
        try:
            loaded = load_location(loaded_by)
        except click.ClickException as error:
            message = f"its checks were not run again: {error.message}"
            told.append(Problem("check", name, "configs", message, "note"))
            continue
        checks = {asset: step.checks for asset, step in loaded["steps"].items()}
        found[loaded["experiment"].name] = RepeatedChecks(store, checks)
    return [lambda record: found[record.experiment](record) if record.experiment in found else ()]


def _events(experiments: Sequence[str], told: list["Problem"]) -> "EventAudit | None":
    """Return what Dagster's events say, where there is an instance; says where there is none."""
    from vpmoe_assets.lineage.integrity import Problem

    home = os.environ.get("DAGSTER_HOME")
    if not home:
        message = "Dagster's events were not compared: there is no DAGSTER_HOME; `set -a; . ./.env` sets it"
        told.append(Problem("witness", experiments[0], "DAGSTER_HOME", message, "note"))
        return None
    from vpmoe_assets.events.auditing import EventAudit
    from vpmoe_assets.resources.told import instance_at

    try:
        with instance_at(Path(home)) as instance:
            return EventAudit(instance, experiments)
    except Exception as error:  # each kind of storage fails in its own way
        message = " ".join(f"Dagster's events were not compared: {error}".split())
        told.append(Problem("witness", experiments[0], "DAGSTER_HOME", message, "note"))
        return None


def _memories(
    store: "Store", index: "Index", experiments: Sequence[str], done: "Verification", some: bool
) -> list["Problem"]:
    """Hold ledger and index against the records, row by row."""
    from vpmoe_assets.lineage.memory_audit import index_problems, ledger_problems

    found: list[Problem] = []
    for name in experiments:
        heads = [head for head in done.heads if head.experiment == name]
        if not some:
            found += ledger_problems(store, name, heads)
        found += index_problems(store, index, name, heads, whole=not some)
    return found


def _report(done: "Verification", told: Sequence["Problem"], signer: str | None, as_json: bool) -> None:
    from vpmoe_assets.lineage.links import broken_links
    from vpmoe_assets.lineage.verify import Verification

    done = Verification(done.heads, [*done.found, *told])
    count, problems = len(done.heads), done.problems
    broken = broken_links(done.heads, problems)
    if as_json:
        answer: dict[str, Any] = {
            "artifacts": count,
            "problems": [each.to_dict() for each in problems],
            "notes": [each.to_dict() for each in done.notes],
        }
        if broken:
            answer["broken"] = [each.to_dict() for each in broken]
        print_json(answer)
    else:
        for each in problems:
            click.echo(str(each))
        for each in done.notes:
            click.echo(f"note: {each}")
        for link in broken:
            if link.below:
                named = ", ".join(link.below[:_MOST_NAMED])
                more = f" and {len(link.below) - _MOST_NAMED} more" if len(link.below) > _MOST_NAMED else ""
                click.echo(f"first broken link: {link}; made from it: {named}{more}")
            else:
                click.echo(f"first broken link: {link}; nothing was made from it")
        found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "all intact"
        if signer and not any(each.kind == "signature" for each in problems):
            found += f", all signed with key {signer[:12]}"
        click.echo(f"{count} artifact{'s' * (count != 1)} verified: {found}", err=bool(problems))
    if problems:
        sys.exit(1)
