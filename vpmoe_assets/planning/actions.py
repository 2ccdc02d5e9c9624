"""What a run would do with each asset of a selection, as the assets themselves decide it when they run."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vpmoe_assets.codebase.toolchain import toolchain_difference
from vpmoe_assets.errors import DataError
from vpmoe_assets.lineage.acceptance import accepted_version
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.fingerprint import recorded_code_version
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.staleness import PresentStep, Standing
from vpmoe_assets.lineage.store import Store

What = Literal["reuse", "build", "unknown", "refuse"]
_ASKED = 20
"""Versions of an asset that are asked whether their code and recipe are the present ones."""


@dataclass(frozen=True)
class Action:
    """What becomes of an asset.

    Attributes:
        asset: Bare name.
        what: `reuse`; `build`; `unknown`: reused if an input that is made again comes out as it was;
            `refuse`: the run ends there, for an input is missing, damaged or blocked.
        why: In words.
        version: That is reused.
        digest: Of its content, where that is known before.
    """

    asset: str
    what: What
    why: str
    version: str | None = None
    digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"asset": self.asset, "action": self.what, "why": self.why, "version": self.version}


def actions(
    store: Store,
    experiment: str,
    steps: Mapping[str, PresentStep],
    found: Mapping[str, Standing],
    selected: Collection[str],
    *,
    strict: bool = False,
) -> list[Action]:
    """Return what becomes of the assets of a selection, each after those that it is made from.

    Args:
        store: With the artifacts.
        experiment: Name.
        steps: What makes each asset now, by name.
        found: Where each asset stands, from `standings`.
        selected: Names; those that are no steps are left out.
        strict: Whether the experiment has `strict_toolchain`.
    """
    planner = _Planner(store, experiment, steps, found, strict)
    return [planner.action(asset) for asset in ordered(steps, selected)]


def ordered(steps: Mapping[str, PresentStep], selected: Collection[str]) -> list[str]:
    """Return the selected steps, each after all that it is made from, else in the order of the graph."""
    done: list[str] = []
    seen: set[str] = set()

    def visit(asset: str) -> None:
        if asset in seen or asset not in steps:
            return
        seen.add(asset)
        for name in (*steps[asset].inputs, *steps[asset].partial):
            visit(name)
        if asset in selected:
            done.append(asset)

    for asset in steps:
        visit(asset)
    return done


@dataclass
class _Planner:
    store: Store
    experiment: str
    steps: Mapping[str, PresentStep]
    found: Mapping[str, Standing]
    strict: bool
    planned: dict[str, Action] = field(default_factory=dict)

    def action(self, asset: str) -> Action:
        step, standing = self.steps[asset], self.found[asset]
        self.planned[asset] = self._refused(step) or self._decided(step, standing)
        return self.planned[asset]

    def _refused(self, step: PresentStep) -> Action | None:
        """Return the refusal of a step with an input that the run neither makes nor may take."""
        for name in step.inputs:
            if name in self.planned:
                if self.planned[name].what == "refuse":
                    return Action(step.asset, "refuse", f"{name} cannot be made")
                continue
            state = self.found[name].state if name in self.found else "missing"
            if state == "missing":
                return Action(step.asset, "refuse", f"{name} is not in the store, and not selected")
            if state in ("damaged", "blocked"):
                return Action(step.asset, "refuse", f"{name} is {state}, and not selected")
        return None

    def _decided(self, step: PresentStep, standing: Standing) -> Action:
        digests: dict[str, str] = {}
        open_inputs: list[str] = []
        for name in (*step.inputs, *step.partial):
            planned, record = self.planned.get(name), self.found[name].record if name in self.found else None
            if planned is not None and planned.digest is not None:
                digests[name] = planned.digest
            elif planned is not None and planned.what != "refuse":
                open_inputs.append(name)
            elif record is not None:
                digests[name] = record.digest
        if open_inputs:
            return self._open(step, standing, open_inputs)
        if standing.state == "fresh" and standing.record is not None and self._same_inputs(step, digests):
            return self._reuse(standing.record, standing)
        try:
            fingerprint, _ = step.fingerprint_of(digests)
        except DataError as error:
            return Action(step.asset, "refuse", str(error))
        suits = _made_with_present if self.strict else None
        record = self.store.reusable(self.experiment, step.asset, fingerprint, suits)
        if record is not None:
            return self._reuse(record, standing)
        accepted = accepted_version(self.store, self.experiment, step.asset, fingerprint)
        if accepted is not None and (suits is None or suits(accepted[0])):
            return self._reuse(accepted[0], standing)
        return Action(step.asset, "build", _because(standing))

    def _same_inputs(self, step: PresentStep, digests: Mapping[str, str]) -> bool:
        latest = {name: self.found[name].record for name in digests if name in self.found}
        return all((record := latest.get(name)) and record.digest == digests[name] for name in digests)

    def _reuse(self, record: Record, standing: Standing) -> Action:
        latest = standing.record is not None and record.record_digest == standing.record.record_digest
        if standing.covered is not None and latest:
            why = standing.covered.short()
        elif latest:
            why = "blocked, and judged again" if standing.state == "blocked" else "up to date"
        elif record.experiment == self.experiment:
            why = f"{record.version} was made with this recipe, code and inputs"
        else:
            why = f"{record.experiment} has it as {record.version}"
        return Action(record.asset, "reuse", why, record.version, record.digest)

    def _open(self, step: PresentStep, standing: Standing, open_inputs: Sequence[str]) -> Action:
        """Return what is known of a step with inputs that are made again."""
        shown = open_inputs if len(open_inputs) < 4 else [*open_inputs[:2], f"{len(open_inputs) - 2} more"]
        waits = f"if {', '.join(shown)} {'come' if len(open_inputs) > 1 else 'comes'} out as before"
        try:
            _, payload = step.fingerprint_of({})
        except DataError as error:
            return Action(step.asset, "refuse", str(error))
        version = recorded_code_version(payload)
        for head in reversed(self.store.scan(self.experiment, step.asset)[0][-_ASKED:]):
            with contextlib.suppress(RecordError, FileNotFoundError):
                own = self.store.record(head).fingerprint_payload
                if recorded_code_version(own) == version:
                    return Action(step.asset, "unknown", f"reused {waits}, else built")
        return Action(step.asset, "build", _because(standing))


def _because(standing: Standing) -> str:
    if standing.state == "missing":
        return "never made"
    said = [cause.line() for cause in standing.causes]
    return (
        "; ".join(said[:2]) + (f" (and {len(said) - 2} more)" if len(said) > 2 else "") or "an input differs"
    )


def _made_with_present(record: Record) -> bool:
    return not toolchain_difference(record.environment)
