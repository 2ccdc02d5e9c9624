"""The plan of a run: what becomes of each asset, what it takes, what is missing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.lineage.remembered import Present
from vpmoe_assets.lineage.staleness import Standing
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.planning.actions import Action, What, actions
from vpmoe_assets.planning.costs import Cost, Costs, Download
from vpmoe_assets.planning.machine import Machine, lacking, this_machine


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        experiment: Name.
        device: That trainings run on.
        actions: What becomes of each asset, in an order in which they can be made.
        costs: What those take that are, or may be, built.
        lacking: What this machine lacks for them.
        machine: What it has.
    """

    experiment: str
    device: str
    actions: Sequence[Action]
    costs: Mapping[str, Cost]
    lacking: Sequence[str]
    machine: Machine

    def count(self, what: What) -> int:
        """Return how many assets become this."""
        return sum(action.what == what for action in self.actions)

    @property
    def refused(self) -> Sequence[Action]:
        """Where the run would end."""
        return [action for action in self.actions if action.what == "refuse"]

    @property
    def seconds(self) -> float:
        """Time of everything of which it is known."""
        return sum(cost.seconds or 0.0 for cost in self.costs.values())

    @property
    def disk(self) -> int:
        """Bytes of everything of which it is known."""
        return sum(cost.disk or 0 for cost in self.costs.values())

    @property
    def downloads(self) -> Sequence[Download]:
        """What is fetched from elsewhere."""
        return [cost.download for cost in self.costs.values() if cost.download is not None]

    @property
    def untimed(self) -> Sequence[str]:
        """Assets of which nobody knows how long they take."""
        return [asset for asset, cost in self.costs.items() if cost.seconds is None]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        rows = [
            {**action.to_dict(), "cost": cost and cost.to_dict()}
            for action in self.actions
            for cost in [self.costs.get(action.asset)]
        ]
        kinds: tuple[What, ...] = ("reuse", "build", "unknown", "refuse")
        return {
            "experiment": self.experiment,
            "device": self.device,
            "assets": rows,
            "counts": {what: self.count(what) for what in kinds},
            "seconds": self.seconds,
            "seconds_unknown": list(self.untimed),
            "disk_bytes": self.disk,
            "disk_free_bytes": self.machine.free,
            "lacking": list(self.lacking),
        }


def plan_of(
    store: Store,
    experiment: Experiment,
    present: Present,
    found: Mapping[str, Standing],
    selected: Collection[str],
    run_config: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a run.

    Args:
        store: With the artifacts.
        experiment: The experiment.
        present: What makes its assets now.
        found: Where they stand, from `standings`.
        selected: Names of those to be made.
        run_config: Dagster's, with the settings of the `trainer` resource, if any.

    Raises:
        ConfigError: The settings contradict each other.
    """
    planned = actions(store, present.experiment, present.steps, found, selected, strict=present.strict)
    priced = Costs(experiment, run_config)
    costs = {
        action.asset: priced.of(action.asset, found[action.asset].record)
        for action in planned
        if action.what in ("build", "unknown")
    }
    machine, device = this_machine(store.root), priced.execution.device
    closures = {asset: present.steps[asset].closure for asset in costs}
    missing = lacking(experiment, costs, closures, device, machine)
    return Plan(present.experiment, device, planned, costs, missing, machine)
