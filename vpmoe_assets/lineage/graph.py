"""The graph of records: what an artifact came from, and whether any of that has moved on since."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.store import Store


@dataclass(frozen=True, slots=True)
class Node:
    """One line of an ancestry tree.

    Attributes:
        depth: 0 for the artifact itself.
        reference: The input as its child names it.
        head: Of the input's record; None where it is no longer in the store, or is another one now.
        repeated: Its own ancestry stands further up already.
    """

    depth: int
    reference: InputRef
    head: Head | None
    repeated: bool


def ancestry(store: Store, record: Record) -> Iterator[Node]:
    """Yield an artifact and everything it came from, depth first; shared ancestors are unfolded once."""
    seen: set[str] = set()
    stack = [(0, record.as_input("self"))]
    while stack:
        depth, reference = stack.pop()
        found = store.head(record.experiment, reference)
        repeated = reference.record_digest in seen
        seen.add(reference.record_digest)
        yield Node(depth, reference, found, repeated)
        if found is not None and not repeated:
            stack += [(depth + 1, parent) for parent in reversed(found.inputs)]


def stale_reasons(latest: Mapping[str, Head]) -> dict[str, str]:
    """Say for each asset of one experiment why its latest version is out of date; fresh ones are left out.

    Args:
        latest: The head of the latest version of every asset of the experiment.
    """
    reasons: dict[str, str] = {}
    pending: list[str] = []

    def reason(asset: str) -> str | None:
        if asset in reasons or asset not in latest or asset in pending:
            return reasons.get(asset)
        pending.append(asset)
        for reference in latest[asset].inputs:
            current = latest.get(reference.asset)
            if current is not None and current.digest != reference.digest:
                reasons[asset] = f"{reference.asset} is now {current.version}"
            elif reason(reference.asset) is not None:
                reasons[asset] = f"{reference.asset} is stale"
            if asset in reasons:
                break
        pending.pop()
        return reasons.get(asset)

    for asset in latest:
        reason(asset)
    return reasons
