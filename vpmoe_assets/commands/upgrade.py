"""`vpmoe upgrade`: artifacts of the earlier schema count again, by a person's word on what can be shown."""

import sys
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.staleness import PresentStep
    from vpmoe_assets.lineage.store import Store
    from vpmoe_assets.lineage.upgrading import Commits, Comparison


@click.command()
@click.argument("assets", nargs=-1, metavar="[ASSET]...")
@experiment_option
@click.option("--because", metavar="TEXT", default="", help="Accept, and say why; without it, only report.")
@click.option("--yes", is_flag=True, help="Accept every one of which everything is shown to be the same.")
@click.option("--recipe", multiple=True, metavar="KEY", help="A key of a recipe whose new value is covered.")
@click.option(
    "--package", "packages", multiple=True, metavar="NAME", help="A package whose new release is covered."
)
@json_option
def upgrade(
    assets: tuple[str, ...],
    experiment: str | None,
    because: str,
    yes: bool,
    recipe: tuple[str, ...],
    packages: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what can be shown of artifacts of the earlier schema, and accept them.

    Their records stay as they are, and verify; but their fingerprints covered other things, so they are made
    again unless a person states that present code makes the same (see `vpmoe accept`). For each latest
    version this compares the code at its commit, recipe, packages and inputs with those of now, in the order
    of the graph. --yes accepts those of which everything is shown to be the same; an ASSET that is named is
    accepted with what differs and what cannot be shown, which the statement then says.

    \b
    Examples:
      vpmoe upgrade
      vpmoe upgrade --yes --because "nothing that makes bytes has changed"
      vpmoe upgrade vpmoe_stage1 --because "only its log changed; I compared the two commits"
    """  # noqa: D301
    from vpmoe_assets import project
    from vpmoe_assets.commands.present import load_steps, step_of
    from vpmoe_assets.lineage.acceptance import Named, has_earlier_fingerprint
    from vpmoe_assets.lineage.upgrading import Commits

    if yes and assets:
        raise click.UsageError(
            "--yes takes all that show everything; an ASSET is named with what it does not show"
        )
    if (yes or recipe or packages) and not because:
        raise click.UsageError("say why, with --because")
    if because and not (yes or assets):
        raise click.UsageError(
            "name the ASSETs that are accepted, or give --yes for all that show everything"
        )
    store, name = open_store(), experiment_in_force(experiment)
    latest = (store.find(name, asset) for asset in store.assets(name))
    if not any(record is not None and has_earlier_fingerprint(record) for record in latest):
        if as_json:
            print_json({"experiment": name, "artifacts": []})
        else:
            click.echo(f"no latest version of experiment {name} is of the earlier schema")
        return
    name, steps = load_steps(experiment or project.experiment_name())
    for asset in assets:
        step_of(steps, name, asset)
    with Commits() as commits:
        work = _Upgrade(store, name, steps, commits, because, set(assets), Named(recipe, packages))
        rows = work.run()
    if as_json:
        print_json({"experiment": name, "artifacts": rows})
    else:
        for row in rows:
            _print(row)
    if any(
        row["state"] == "refused" or (row["asset"] in assets and row["state"] != "accepted") for row in rows
    ):
        sys.exit(1)


class _Upgrade:
    """One pass over the graph, inputs first."""

    def __init__(
        self,
        store: "Store",
        experiment: str,
        steps: "Mapping[str, PresentStep]",
        commits: "Commits",
        because: str,
        assets: set[str],
        named: Any,
    ) -> None:
        self.store = store
        self.experiment = experiment
        self.steps = steps
        self.commits = commits
        self.because = because
        self.assets = assets
        self.named = named
        self.settled: dict[str, bool] = {}
        """Whether the latest version of an asset counts for present code, or would once it is accepted."""

    def run(self) -> list[dict[str, Any]]:
        """Return what became of every asset whose latest version is of the earlier schema."""
        rows = [self.one(asset) for asset in _ordered(self.steps)]
        return [row for row in rows if row is not None]

    def one(self, asset: str) -> dict[str, Any] | None:
        from vpmoe_assets.commands.present import present_identity
        from vpmoe_assets.lineage.acceptance import active_acceptance, has_earlier_fingerprint
        from vpmoe_assets.lineage.upgrading import compare

        step, record = self.steps[asset], self.store.find(self.experiment, asset)
        if record is None:
            self.settled[asset] = asset not in self.required()
            return None
        present = present_identity(step, self.store, self.experiment)
        fingerprint, payload = ("", {}) if isinstance(present, list) else present
        by = active_acceptance(record, self.store.statements, fingerprint)
        upstream = (*step.inputs, *step.partial)
        unsettled = [name for name in upstream if not self.settled.get(name, True)]
        earlier = has_earlier_fingerprint(record)
        if not earlier or by is not None:
            counts = by is not None or record.fingerprint == fingerprint
            self.settled[asset] = counts and not unsettled
            done = by is not None and earlier
            return _row(record, "upgraded already", statement=by.statement.id) if done and by else None
        if isinstance(present, list):
            self.settled[asset] = False
            return _row(
                record, "cannot count", unknown=[f"input {name}: never published" for name in present]
            )
        found = compare(record, fingerprint, payload, step.closure, self.commits)
        row = self.accepted(found, unsettled)
        self.settled[asset] = row["state"] in ("accepted", "shown to be the same")
        return row

    def accepted(self, found: "Comparison", unsettled: "Sequence[str]") -> dict[str, Any]:
        """Accept one artifact if that is asked for, and return what is known of it."""
        from vpmoe_assets.lineage.acceptance import Named, acceptances_of
        from vpmoe_assets.lineage.errors import StatementError

        record = found.record
        row = _row(
            record,
            "shown to be the same" if found.proven and not unsettled else "not all is shown",
            shown=list(found.shown),
            unknown=[*found.unknown, *(f"input {name}: it does not count itself" for name in unsettled)],
            differs=found.difference.lines(),
        )
        if found.unequal:
            return row | {"state": "cannot count", "unequal_inputs": list(found.unequal)}
        asked = record.asset in self.assets if self.assets else found.proven
        if not (self.because and asked):
            return row
        if unsettled:
            return row | {"state": "refused", "reason": f"upgrade {', '.join(unsettled)} first"}
        differing = {change.name for change in (*found.difference.recipe, *found.difference.packages)}
        named = Named(
            [key for key in self.named.recipe if key in differing],
            [name for name in self.named.packages if name in differing],
        )
        try:
            said = acceptances_of(record, self.store.statements)
            statement = found.accepted(said, reason=self.because, named=named)
        except StatementError as error:
            return row | {"state": "refused", "reason": str(error)}
        return row | {"state": "accepted", "statement": self.store.statements.append(statement).id}

    def required(self) -> set[str]:
        """Return the assets that others cannot do without."""
        return {name for step in self.steps.values() for name in step.inputs}


def _ordered(steps: "Mapping[str, PresentStep]") -> list[str]:
    """Return the assets, each after what it is made from."""
    from graphlib import TopologicalSorter

    graph = {
        name: [up for up in (*step.inputs, *step.partial) if up in steps] for name, step in steps.items()
    }
    return list(TopologicalSorter(graph).static_order())


def _row(record: "Record", state: str, **more: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"shown": [], "unknown": [], "differs": [], "unequal_inputs": []}
    return {"asset": record.asset, "version": record.version, "state": state, **facts, **more}


def _print(row: "Mapping[str, Any]") -> None:
    click.echo(f"{row['asset']}@{row['version']}: {row['state']}")
    for mark, lines in (
        ("  = ", row["shown"]),
        ("  ≠ ", [*row["differs"], *row["unequal_inputs"]]),
        ("  ? ", row["unknown"]),
        ("  ! ", [row["reason"]] if "reason" in row else []),
    ):
        for line in lines:
            click.echo(mark + line)
