"""`vpmoe adopt`: a run or data set made by hand comes into the store, as what it is."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    experiment_option,
    json_option,
    open_index,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpmoe_assets.checks.check import Check
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.standing import Finding
    from vpmoe_assets.lineage.store import Store

BLOCKED = 3
"""Exit code: it is in the store, and its checks keep others from building on it."""


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--as", "asset", required=True, metavar="ASSET", help="Asset of the experiment that it stands for."
)
@experiment_option
@click.option("--because", metavar="TEXT", default="", help="Why, or how it was made; shown beside it.")
@click.option("--trust", is_flag=True, help="Take pickles too, which run code when they are opened.")
@click.option("--replace", is_flag=True, help="Stand before a version that was made here; that one stays.")
@json_option
def adopt(
    directory: str,
    asset: str,
    experiment: str | None,
    because: str,
    trust: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Take a run or data set that was made by hand into the store, as a version of ASSET.

    DIRECTORY is the payload itself, or what the trainer leaves: `payload/` with logs beside it. Files are
    copied, never moved. Known are safetensors, .bin with .idx, parquet, JSON lines, top-K shards; links and
    devices are refused, and pickles without --trust. The record says "adopted": by whom, from where, and the
    digest of each file, and claims neither recipe nor inputs nor code. The checks of the asset judge it like
    one that was made; inputs that they need are the latest ones. Present code did not make it, so it reads
    stale, and a run makes the asset anew, until you say `vpmoe accept ASSET --because TEXT`. Exit code 0:
    adopted, now or before; 3: adopted, and blocked by its checks; 1: refused.

    \b
    Examples:
      vpmoe adopt ~/runs/stage1 --as vpmoe_stage1 --because "trained by hand on the other cluster"
      vpmoe adopt corpus/ --as synth --replace
      vpmoe adopt old/ --as qwen3_0_6b --trust --json | jq -r .artifact
    """  # noqa: D301
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.commands.present import load_location, unknown_asset
    from vpmoe_assets.lineage.adoption import Surroundings, origin, require_adoptable
    from vpmoe_assets.lineage.adoption import adopt as taken_in
    from vpmoe_assets.lineage.foreign_files import look
    from vpmoe_assets.lineage.layout import version_name
    from vpmoe_assets.lineage.provenance import code_of, environment

    if "@" in asset:
        bare = asset.partition("@")[0]
        raise click.ClickException(f"--as {asset}: the store names the version; say --as {bare}")
    _refuse_inside(Path(directory))
    prefix, _, name = asset.rpartition("/")
    store = open_store()
    location = load_location(prefix or experiment or project.experiment_name())
    place, steps = location["experiment"].name, location["steps"]
    if name not in steps:
        raise unknown_asset(name, steps, place)
    step = steps[name]
    found = look(Path(directory))
    require_adoptable(store, place, name, found, trust=trust, replace=replace)
    about = Surroundings(
        code_of(current()).state,
        environment(),
        sys.argv,
        [check.name for check in step.checks if check.blocking],
    )
    record, new = taken_in(store, place, name, Path(directory), found, about, reason=because)
    verdicts = _judged(store, step.checks, [*step.inputs, *step.partial], record)
    open_index().update(store)
    blocking = [finding.check for finding in verdicts if finding.blocks]
    if as_json:
        print_json(
            {
                "artifact": version_name(record),
                "new": new,
                "record_digest": record.record_digest,
                "digest": record.digest,
                "files": len(record.files),
                "adopted": record.details["adopted"],
                "checks": {finding.check: finding.outcome for finding in verdicts},
                "blocked_by": blocking,
            }
        )
    else:
        _tell(record, origin(record) if new else f"known already, {origin(record)}", found.left, verdicts)
    if blocking:
        sys.exit(BLOCKED)


def _refuse_inside(directory: Path) -> None:
    """Refuse a directory of the store, or one that holds it.

    Raises:
        ClickException: It is.
    """
    root, place = project.store_root(), directory.resolve()
    if place == root or root in place.parents or place in root.parents:
        raise click.ClickException(
            f"{directory} and the store {root} lie within each other; what the store has is no foreign thing "
            "(`vpmoe ls`), and what it has not lies outside"
        )


def _judged(
    store: "Store", checks: "Sequence[Check]", names: "Sequence[str]", record: "Record"
) -> "tuple[Finding, ...]":
    """Let the checks of an asset judge it, as they judge what is made here.

    Args:
        store: With the artifact.
        checks: Of the asset.
        names: Of the assets that it would be made from; their latest versions are compared with.
        record: Of the artifact.
    """
    from vpmoe_assets.build import Published
    from vpmoe_assets.checks.judging import judge
    from vpmoe_assets.lineage.errors import EvidenceMissing

    class Inputs(dict[str, Published]):
        def __missing__(self, name: str) -> Published:
            raise EvidenceMissing(f"{name}, with which it would be compared, is not in the store")

    inputs = Inputs()
    for name in names:
        if (there := store.find(record.experiment, name)) is not None:
            inputs[name] = Published(there, store.directory(there))
    return judge(checks, Published(record, store.directory(record)), inputs, store.statements, _ignored)


def _ignored(line: str) -> None:
    """Take no note of what is told at the end."""


def _tell(record: "Record", how: str, left: "Sequence[str]", verdicts: "Sequence[Finding]") -> None:
    from vpmoe_assets.lineage.layout import version_name
    from vpmoe_assets.units import human_bytes

    click.echo(f"{version_name(record)}: {len(record.files)} files, {human_bytes(record.size)}; {how}")
    if left:
        click.echo(f"not taken, lying beside payload/: {', '.join(left)}")
    for finding in verdicts:
        state = f"{finding.outcome}, blocks" if finding.blocks else finding.outcome
        click.echo(f"  {state:<20} {finding.check}{f': {finding.reason}' if finding.reason else ''}")
    click.echo(
        "`vpmoe report-events` tells Dagster; `vpmoe accept` has it counted as what present code makes"
    )
