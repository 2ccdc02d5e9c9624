"""Two runs, or two experiments, side by side: what differs, and what of it differs by itself."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vpmoe_assets.lineage.comparison import SCHEMA
from vpmoe_assets.lineage.designation import Group
from vpmoe_assets.lineage.difference import Change, Difference, recipe_changes
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

State = Literal["same", "content", "made otherwise", "differs", "only in a", "only in b"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One asset on both sides.

    Attributes:
        asset: Name.
        old: Version, or None.
        new: The same of the other side.
        state: `same` in content and fingerprint; `content`: equal recipe, code and inputs, and other bytes;
            `made otherwise`: another fingerprint, and the same bytes; `differs` in both.
        own: What differs in its own recipe, code and packages: with any of it, it is a cause; without, the
            change comes from its inputs.
        inputs: Names of the inputs whose contents differ.
        metrics: Values of the headline number that both have: its name, old, new.
    """

    asset: str
    old: str | None
    new: str | None
    state: State
    own: Difference
    inputs: tuple[str, ...]
    metrics: tuple[str, float, float] | None


@dataclass(frozen=True, slots=True)
class GroupComparison:
    """Two runs or two experiments.

    Attributes:
        what: `run` or `experiment`.
        a: Name of the first.
        b: Name of the second.
        pairs: By asset; causes first among those that differ.
        settings: Values of the resolved experiment file that differ; empty for runs of one.
        notes: What could not be compared.
    """

    what: str
    a: str
    b: str
    pairs: tuple[Pair, ...]
    settings: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every artifact is the same, made in the same way."""
        return all(pair.state == "same" for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        pairs = [{**asdict(pair), "own": pair.own.to_json()} for pair in self.pairs]
        return {"schema": SCHEMA, "same": self.same, **asdict(self), "pairs": pairs}


def compare_groups(store: Store, old: Group, new: Group) -> GroupComparison:
    """Compare two runs, or two experiments, asset by asset."""
    assets = [*old.records, *(name for name in new.records if name not in old.records)]
    pairs = [_pair(name, old.records.get(name), new.records.get(name)) for name in assets]
    pairs.sort(key=lambda pair: (pair.state == "same", not pair.own))
    notes: list[str] = []
    settings: tuple[Change, ...] = ()
    try:
        one, other = (_settings(store, group) for group in (old, new))
        settings = tuple(each for each in recipe_changes(one, other) if each.name != "name")
    except (LineageError, OSError, ValueError) as error:
        notes.append(f"settings: {error}")
    return GroupComparison(old.what, old.name, new.name, tuple(pairs), settings, tuple(notes))


def _pair(asset: str, old: Record | None, new: Record | None) -> Pair:
    if old is None or new is None:
        state: State = "only in b" if old is None else "only in a"
        versions = [None if each is None else each.version for each in (old, new)]
        return Pair(asset, versions[0], versions[1], state, Difference(), (), None)
    content, recipe = old.digest != new.digest, old.fingerprint != new.fingerprint
    own = Difference.between(old.fingerprint_payload, new.fingerprint_payload)
    before, after = ({ref.role: ref.digest for ref in side.inputs} for side in (old, new))
    moved = tuple(
        sorted(role for role in before.keys() | after.keys() if before.get(role) != after.get(role))
    )
    return Pair(
        asset,
        old.version,
        new.version,
        ("differs" if recipe else "content") if content else ("made otherwise" if recipe else "same"),
        own,
        moved,
        _headline(old, new),
    )


def _headline(old: Record, new: Record) -> tuple[str, float, float] | None:
    for name in ("valid_loss", "loss", "mean", "rows", "tokens", "parameters"):
        one, other = old.metrics.get(name), new.metrics.get(name)
        if isinstance(one, int | float) and isinstance(other, int | float):
            return name, one, other
    return None


def _settings(store: Store, group: Group) -> dict[str, Any]:
    """Return the resolved experiment under which the newest artifact of a group was made."""
    newest = max(group.records.values(), key=lambda record: record.published_utc, default=None)
    if newest is None or newest.objects.resolved_experiment is None:
        return {}
    found: dict[str, Any] = ObjectStore(store.root).get_json(newest.objects.resolved_experiment)
    return found
