"""Where each asset of an experiment stands against present code and recipe, and why.

An asset is out of date where Dagster marks it so: its code version (recipe, code, packages) is another one
now, or an input has other content now. It is stale, too, where one of its inputs is, however far up: Dagster
marks it once that was made again and came out different. What was made again with the same bytes makes
nothing stale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.toolchain import toolchain_difference
from vpmoe_assets.errors import DataError
from vpmoe_assets.lineage.acceptance import active_acceptance
from vpmoe_assets.lineage.adoption import is_adopted, origin
from vpmoe_assets.lineage.difference import Change, Difference
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.latest import Latest
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.remarks import Remark
from vpmoe_assets.lineage.store import Store

State = Literal["fresh", "stale", "missing", "unknown", "blocked", "damaged"]
Kind = Literal[
    "recipe",
    "code",
    "package",
    "toolchain",
    "schema",
    "outside",
    "outside_unread",
    "input",
    "input_added",
    "input_removed",
    "input_missing",
    "input_stale",
    "check",
    "damage",
    "no_step",
    "adopted",
]
_NO_STALENESS = frozenset({"check", "damage", "no_step", "input_missing", "outside_unread"})
"""Kinds of causes that say nothing about whether an artifact is out of date."""


ABOVE = frozenset({"input_stale", "input_missing"})
"""Kinds of causes that are themselves a state of an input."""


class PresentStep(Protocol):
    """What present code and recipe make an asset with; `vpmoe_assets.assets.step.Step` is one."""

    @property
    def asset(self) -> str:
        """Bare name."""

    @property
    def closure(self) -> Closure:
        """The code that decides its bytes."""

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the assets that it is made from."""

    @property
    def partial(self) -> Sequence[str]:
        """Names of further ones, each used only if it was ever published."""

    def fingerprint_of(self, digests: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Return the recipe fingerprint, and its payload, with inputs of these digests, by name."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason for a state.

    Attributes:
        kind: `recipe`, `code`, `package`: that differs; `toolchain`: a package that `strict_toolchain` holds
            to; `schema`: of an earlier fingerprint, which covers other things; `outside`: a folder has other
            content; `outside_unread`: it cannot be read; `input`: has other content now; `input_added`,
            `input_removed`; `input_missing`: not in the store; `input_stale`: is out of date itself; `check`:
            blocks; `damage`: of a file; `no_step`: nothing in the experiment makes the asset; `adopted`: it
            was made elsewhere.
        name: Dotted key, path of a file, package, asset, or check.
        old: What it was made with: canonical JSON of a value, digest, release, version of an input.
        new: The same of now; None where it is not there.
        detail: More, in words.
        definitions: Of changed code, the functions and classes that say another thing, where that is known.
        causes: Why an input is what it is now.
        repeated: Its causes stand further up already.
    """

    kind: Kind
    name: str
    old: str | None = None
    new: str | None = None
    detail: str = ""
    definitions: tuple[str, ...] = ()
    causes: tuple["Cause", ...] = ()
    repeated: bool = False

    def line(self) -> str:
        """Return it for people."""
        match self.kind:
            case "recipe" | "package":
                return f"{self.kind} {Change(self.name, self.old, self.new)}"
            case "toolchain":
                return f"strict_toolchain: {Change(self.name, self.old, self.new)}"
            case "outside":
                return f"the content of {self.name} has changed"
            case "outside_unread":
                return self.detail
            case "code":
                how = "added" if self.old is None else "removed" if self.new is None else "changed"
                return f"code {how}: {':'.join((self.name, ', '.join(self.definitions))).rstrip(':')}"
            case "schema":
                return "made by a program whose fingerprint covers other things; see `vpmoe upgrade`"
            case "input":
                return f"{self.name} is now {self.new or 'other content'}"
            case "input_added":
                return f"{self.name} is an input now, and was none"
            case "input_removed":
                return f"{self.name} was an input, and is none now"
            case "input_missing":
                return f"{self.name} is not in the store"
            case "input_stale":
                return f"{self.name} is stale"
            case "check":
                return f"check {self.name}: {self.detail}"
            case "damage":
                return f"{self.name} {self.detail}"
            case "no_step":
                return "nothing in the experiment makes it"
            case "adopted":
                return f"{self.detail}, not made by this code"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "old": self.old,
            "new": self.new,
            "text": self.line(),
            **({"definitions": list(self.definitions)} if self.definitions else {}),
            **({"repeated": True} if self.repeated else {}),
            **({"causes": [cause.to_dict() for cause in self.causes]} if self.causes else {}),
        }


@dataclass(frozen=True)
class Standing:
    """Where the latest version of an asset stands.

    Attributes:
        asset: Bare name.
        state: `fresh`; `stale`, an `input_stale` alone included; `missing`: never published; `unknown`: an
            input is not in the store, or nothing makes the asset any more; `blocked` by a check; `damaged`.
            The worst counts, and `causes` has them all.
        record: Of the latest version; None where there is none, or it cannot be read.
        fingerprint: That it would have if it were made now; None where an input is missing.
        causes: Why; the worst first.
        covered: A person's word by which differences do not count.
    """

    asset: str
    state: State
    record: Record | None = None
    fingerprint: str | None = None
    causes: tuple[Cause, ...] = ()
    covered: Remark | None = None

    @property
    def stale(self) -> bool:
        """Whether it, or anything it came from, is out of date, be it blocked or damaged as well."""
        return any(cause.kind not in _NO_STALENESS for cause in self.causes)

    @property
    def marked(self) -> bool:
        """Whether Dagster marks it out of date: for what it is itself, not for what its inputs may become."""
        own = _NO_STALENESS | {"input_stale", "toolchain", "outside"}
        return any(cause.kind not in own for cause in self.causes)

    @property
    def summary(self) -> str:
        """The state and its first causes, in a line."""
        said = [cause.line() for cause in self.causes]
        more = f" (and {len(said) - 2} more)" if len(said) > 2 else ""
        return f"{self.state}: {'; '.join(said[:2])}{more}" if said else self.state

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "asset": self.asset,
            "state": self.state,
            "version": self.record and self.record.version,
            "fingerprint": self.fingerprint,
            "causes": [cause.to_dict() for cause in self.causes],
            "covered": self.covered and self.covered.to_dict(),
        }


def standings(
    store: Store,
    experiment: str,
    steps: Mapping[str, PresentStep],
    *,
    strict: bool = False,
    latest: Latest | None = None,
) -> dict[str, Standing]:
    """Return where every asset of an experiment stands: those it makes, then others that the store has of it.

    Payloads are compared with their records by names and sizes; `vpmoe verify` reads them.

    Args:
        store: With the artifacts.
        experiment: Name.
        steps: What makes each asset, by name, in the order of the graph.
        strict: Whether the experiment has `strict_toolchain`.
        latest: The latest versions, where they are at hand.
    """
    latest = latest or Latest(store, experiment)
    look = _Look(store, latest, steps, strict)
    others = [asset for asset in latest.assets if asset not in steps]
    found = {asset: look.at(asset) for asset in steps}
    return found | {
        asset: other for asset in others if (other := look.at(asset)).record or other.state == "damaged"
    }


def difference_causes(difference: Difference) -> list[Cause]:
    """Return what differs between two identities as causes."""
    return [
        *(Cause("recipe", change.name, change.old, change.new) for change in difference.recipe),
        *(Cause("code", change.name, change.old, change.new) for change in difference.sources),
        *(Cause("package", change.name, change.old, change.new) for change in difference.packages),
    ]


@dataclass
class _Look:
    store: Store
    latest: Latest
    steps: Mapping[str, PresentStep]
    strict: bool
    found: dict[str, Standing] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    def at(self, asset: str) -> Standing:
        if asset not in self.found:
            self.begun.add(asset)
            self.found[asset] = self.looked_at(asset)
        return self.found[asset]

    def head(self, asset: str) -> Head | None:
        known = self.latest.head(asset)
        return known if isinstance(known, Head) else None

    def looked_at(self, asset: str) -> Standing:
        step, head = self.steps.get(asset), self.latest.head(asset)
        record: Record | None = None
        if isinstance(head, Head):
            try:
                record = self.latest.record(head)
            except (RecordError, FileNotFoundError) as error:
                head = RecordError(str(error))
        if isinstance(head, RecordError):
            return Standing(asset, "damaged", causes=(Cause("damage", "record", detail=str(head)),))
        above = [] if step is None else self.above(step)
        if record is None:
            return Standing(asset, "missing", causes=tuple(above))
        fingerprint, covered, differing = None, None, [Cause("no_step", asset)]
        if step is not None:
            fingerprint, covered, differing = self.compared(record, step)
        wrong = [*self.damage(record), *self.blocking(record)]
        causes = (*wrong, *differing, *above)
        return Standing(asset, _state(causes), record, fingerprint, causes, covered)

    def compared(self, record: Record, step: PresentStep) -> tuple[str | None, Remark | None, list[Cause]]:
        """Return the present fingerprint, the word by which the record counts for it, and what differs."""
        digests = self.digests(step)
        try:
            present, payload = step.fingerprint_of(digests)
        except DataError as error:
            return None, None, [Cause("outside_unread", record.asset, detail=str(error))]
        fingerprint = present if set(step.inputs) <= digests.keys() else None
        if covered := self.covered(record, fingerprint):
            return fingerprint, covered, []
        return fingerprint, None, self.differing(record, step, present, payload)

    def above(self, step: PresentStep) -> list[Cause]:
        """Return its inputs that are missing, or out of date themselves."""
        found = [Cause("input_missing", name) for name in step.inputs if self.head(name) is None]
        for name in (*step.inputs, *step.partial):
            if name in self.begun and name not in self.found:
                continue  # an asset that is an input of its own: no graph has one, but records may name it
            if self.head(name) is not None and self.at(name).stale:
                found.append(Cause("input_stale", name))
        return found

    def digests(self, step: PresentStep) -> dict[str, str]:
        heads = {name: self.head(name) for name in (*step.inputs, *step.partial)}
        return {name: head.digest for name, head in heads.items() if head is not None}

    def covered(self, record: Record, fingerprint: str | None) -> Remark | None:
        if fingerprint is None or record.fingerprint == fingerprint:
            return None
        by = active_acceptance(record, self.store.statements, fingerprint)
        if by is None:
            return None
        return Remark(record.experiment, record.asset, record.version, by.statement.id, by, own=True)

    def differing(
        self, record: Record, step: PresentStep, fingerprint: str, payload: Mapping[str, Any]
    ) -> list[Cause]:
        found: list[Cause] = []
        own = record.fingerprint_payload
        if is_adopted(record):
            return [Cause("adopted", record.asset, detail=origin(record))]
        if self.strict:
            releases = toolchain_difference(record.environment)
            found += [Cause("toolchain", name, *pair) for name, pair in releases.items()]
        if record.fingerprint == fingerprint:
            return found
        if own.get("schema") != payload["schema"]:
            return [*found, Cause("schema", record.asset, own.get("schema"), payload["schema"])]
        found += difference_causes(Difference.between(own, payload))
        return [*found, *self.changed_inputs(record, step, own.get("inputs", {}), payload["inputs"])]

    def changed_inputs(
        self, record: Record, step: PresentStep, old: Mapping[str, str], new: Mapping[str, str]
    ) -> list[Cause]:
        used = {reference.role: reference.version for reference in record.inputs}
        assets = {*step.inputs, *step.partial, *used}
        found: list[Cause] = []
        for role in sorted(old.keys() | new.keys()):
            if old.get(role) == new.get(role) or (role in step.inputs and role not in new):
                continue  # which is missing, and said so elsewhere
            if role not in assets:
                found.append(Cause("outside", role, old.get(role), new.get(role)))
            elif role not in old:
                found.append(Cause("input_added", role, None, self.version(role)))
            elif role not in new:
                found.append(Cause("input_removed", role, used.get(role)))
            else:
                found.append(Cause("input", role, used.get(role), self.version(role)))
        return found

    def version(self, asset: str) -> str | None:
        head = self.head(asset)
        return None if head is None else head.version

    def damage(self, record: Record) -> list[Cause]:
        problems = payload_problems(self.store.directory(record), record, None)
        return [Cause("damage", problem.path, detail=problem.message) for problem in problems]

    def blocking(self, record: Record) -> list[Cause]:
        return [
            Cause("check", finding.check, detail=finding.reason or finding.outcome)
            for finding in self.store.blocked_by(record)
        ]


def _state(causes: Sequence[Cause]) -> State:
    kinds = {cause.kind for cause in causes}
    if "damage" in kinds:
        return "damaged"
    if "check" in kinds:
        return "blocked"
    if kinds - _NO_STALENESS:
        return "stale"
    return "unknown" if kinds else "fresh"


def unfolded(found: Mapping[str, Standing], asset: str, seen: set[str] | None = None) -> tuple[Cause, ...]:
    """Return the causes of an asset's state with those of the inputs that are stale or missing, to the root.

    The causes of an input stand below it where it is first met.

    Args:
        found: From `standings`.
        asset: Bare name.
        seen: Assets whose causes stand elsewhere already.
    """
    seen = {asset} if seen is None else seen
    causes: list[Cause] = []
    for cause in found[asset].causes:
        if cause.kind not in ABOVE or cause.name not in found:
            causes.append(cause)
        elif cause.name in seen:
            causes.append(replace(cause, repeated=bool(found[cause.name].causes)))
        else:
            seen.add(cause.name)
            causes.append(replace(cause, causes=unfolded(found, cause.name, seen)))
    return tuple(causes)
