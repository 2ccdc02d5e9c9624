"""What makes an asset, before its inputs are known: its identity and its checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree, current
from vpmoe_assets.events.metadata import CODE_VERSION_DIGITS
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint


@dataclass(frozen=True)
class Step:
    """What makes an asset, before its inputs are known.

    Attributes:
        experiment: The experiment in force.
        asset: Bare name.
        recipe: Identity of the step: resolved, JSON-able.
        closure: The code that decides its bytes.
        seed: Of the step, if it draws random numbers; part of its identity.
        checks: Run on what is published, before anything is built on it.
        inputs: Names of the assets that it is made from.
        partial: Names of further ones, each used only if it was ever published.
        external: Digests of inputs that are not assets (a local folder), taken when the step runs.
        tree: The sources as they were read.
    """

    experiment: Experiment
    asset: str
    recipe: Mapping[str, Any]
    closure: Closure
    seed: int | None = None
    checks: Sequence[Check] = ()
    inputs: Sequence[str] = ()
    partial: Sequence[str] = ()
    external: Callable[[], Mapping[str, str]] | None = None
    tree: SourceTree = field(default_factory=current)

    @property
    def key(self) -> dg.AssetKey:
        """Of the asset."""
        return asset_key(self.experiment, self.asset)

    @property
    def identity(self) -> dict[str, Any]:
        """Recipe and seed."""
        return dict(self.recipe) if self.seed is None else {**self.recipe, "seed": self.seed}

    @property
    def code_version(self) -> str:
        """Identity and code, hashed, for Dagster."""
        return code_version(self.identity, self.closure)[:CODE_VERSION_DIGITS]

    @property
    def check_specs(self) -> list[dg.AssetCheckSpec]:
        """Of the checks, for Dagster."""
        return [
            dg.AssetCheckSpec(
                check.name, asset=self.key, blocking=check.blocking, description=check.description
            )
            for check in self.checks
        ]

    def fingerprint(self, inputs: Mapping[str, Published]) -> tuple[str, dict[str, Any]]:
        """Return the recipe fingerprint and the payload it is the hash of.

        Args:
            inputs: By name; each name is the input's role.
        """
        return self.fingerprint_of({name: item.record.digest for name, item in inputs.items()})

    def fingerprint_of(self, digests: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Return the same for inputs of which only the content digests are known, by name."""
        outside = dict(self.external()) if self.external else {}
        return recipe_fingerprint(self.identity, self.closure, {**digests, **outside})


@dataclass(frozen=True)
class Produced:
    """An assets definition and the steps behind it, one for each of its assets."""

    definition: dg.AssetsDefinition
    steps: tuple[Step, ...]


def asset_key(experiment: Experiment, asset: str) -> dg.AssetKey:
    """Return `<experiment>/<asset>`."""
    return dg.AssetKey([experiment.name, asset])


def catalogued(experiment: Experiment, *, trains: bool = False) -> dict[str, Any]:
    """Return by what people find an asset in the UI's catalogue: its owners and tags.

    Args:
        experiment: The experiment in force.
        trains: Whether it launches a trainer job.
    """
    tags = {"experiment": experiment.name, "runs_in": "trainer" if trains else "orchestrator"}
    return {"owners": ["team:vpmoe"], "tags": tags}


def records_key(experiment: Experiment) -> dg.AssetKey:
    """Return the key of what stands for all records of an experiment in Dagster's graph."""
    return asset_key(experiment, "records")
