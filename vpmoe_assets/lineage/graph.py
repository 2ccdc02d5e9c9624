"""The graph of records: what an artifact came from, what was made from it, and whether that has moved on.

Its nodes are records, known by their digests: materialisations, not the assets of present code. A version
that is gone is told from the ledger, and the way goes on behind it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.store import Store

State = Literal["present", "gone", "unknown"]
HEADLINES = (
    "valid_loss",
    "loss",
    "mean",
    "num_layers",
    "parameters",
    "active_parameters",
    "tokens",
    "rows",
)
"""Metrics that say most of an artifact, the first first."""


@dataclass(frozen=True, slots=True)
class Node:
    """One materialisation.

    Attributes:
        experiment: Name.
        asset: Name.
        version: Name.
        digest: Of its content.
        record_digest: Of its record, by which it is known.
        state: `present`; `gone` from the store, and told from the ledger; `unknown` to both, so that only the
            records that name it say anything of it.
        head: The head of its record; None where it is unknown.
    """

    experiment: str
    asset: str
    version: str
    digest: str
    record_digest: str
    state: State
    head: Head | None

    @property
    def headline(self) -> dict[str, Any]:
        """The numbers that say most of it, by name, the first first."""
        metrics = {} if self.head is None else self.head.metrics
        return {name: metrics[name] for name in HEADLINES if metrics.get(name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        head = self.head
        return {
            "record_digest": self.record_digest,
            "experiment": self.experiment,
            "asset": self.asset,
            "version": self.version,
            "sequence": head and head.sequence,
            "digest": self.digest,
            "state": self.state,
            "bytes": head and head.size,
            "published_utc": head and head.published_utc,
            "started_utc": head and head.started_utc,
            "finished_utc": head and head.finished_utc,
            "metrics": self.headline,
            "original": head and head.original and head.original.model_dump(),
        }


@dataclass(frozen=True, slots=True)
class Edge:
    """One record that names another.

    Attributes:
        parent: Record digest of the one that is named.
        child: Record digest of the one that names it.
        reference: How it does; its role is the one the parent has for the child.
        kind: `input` of what was made from it, or `original` of a record that repeats it.
    """

    parent: str
    child: str
    reference: InputRef
    kind: Literal["input", "original"] = "input"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "parent": self.parent,
            "child": self.child,
            "kind": self.kind,
            "role": self.reference.role,
            "acceptance": self.reference.acceptance,
        }


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a tree.

    Attributes:
        depth: 0 for the artifact itself.
        node: That it is about.
        reference: How the child names its parent; of the artifact itself with the role `self`.
        repeated: What is behind it stands further up already.
    """

    depth: int
    node: Node
    reference: InputRef
    repeated: bool


@dataclass(frozen=True)
class Graph:
    """Records and how they name each other.

    Attributes:
        start: Record digest of the artifact that was asked about.
        nodes: By record digest.
        edges: Among the nodes.
    """

    start: str
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    @cached_property
    def parents(self) -> dict[str, list[Edge]]:
        """The edges to what each node came from, in the order of its record."""
        return _by((edge.child, edge) for edge in self.edges)

    @cached_property
    def children(self) -> dict[str, list[Edge]]:
        """The edges to what was made from each node."""
        return _by((edge.parent, edge) for edge in self.edges)

    def ordered(self) -> list[Node]:
        """Return the nodes, each after all that it came from; those of a forged circle last."""
        waiting = {digest: len(self.parents.get(digest, ())) for digest in self.nodes}
        ready = deque(digest for digest, count in waiting.items() if count == 0)
        order: list[str] = []
        while ready:
            order.append(digest := ready.popleft())
            for edge in self.children.get(digest, ()):
                waiting[edge.child] -= 1
                if waiting[edge.child] == 0:
                    ready.append(edge.child)
        placed = set(order)
        return [self.nodes[digest] for digest in (*order, *(d for d in self.nodes if d not in placed))]

    def within(self, depth: int) -> "Graph":
        """Return what is at most so many steps from the start, up or down."""
        near = {self.start}
        for edges, end in ((self.parents, "parent"), (self.children, "child")):
            reached = {self.start}
            outermost = [self.start]
            for _ in range(depth):
                outermost = [
                    found
                    for digest in outermost
                    for edge in edges.get(digest, ())
                    if (found := getattr(edge, end)) not in reached
                ]
                reached |= set(outermost)
                outermost = list(dict.fromkeys(outermost))
            near |= reached
        return Graph(
            self.start,
            {digest: node for digest, node in self.nodes.items() if digest in near},
            tuple(edge for edge in self.edges if edge.parent in near and edge.child in near),
        )

    def nearest(self, most: int) -> "Graph":
        """Return the start and the nodes nearest to it, up and down alike, at most so many in all."""
        above, below = (self._reached(edges) for edges in (self.parents, self.children))
        half = (most - 1) // 2
        up = above[: max(half, most - 1 - len(below))]
        near = {self.start, *up, *below[: most - 1 - len(up)]}
        return Graph(
            self.start,
            {digest: node for digest, node in self.nodes.items() if digest in near},
            tuple(edge for edge in self.edges if edge.parent in near and edge.child in near),
        )

    @property
    def above(self) -> int:
        """How many records it came from."""
        return len(self._reached(self.parents))

    @property
    def below(self) -> int:
        """How many records were made from it."""
        return len(self._reached(self.children))

    def _reached(self, edges: Mapping[str, list[Edge]]) -> list[str]:
        """Return what is reached from the start by edges of one direction, nearest first, without it."""
        found: dict[str, None] = {self.start: None}
        waiting = deque(found)
        while waiting:
            for edge in edges.get(digest := waiting.popleft(), ()):
                if (other := edge.child if edge.parent == digest else edge.parent) not in found:
                    found[other] = None
                    waiting.append(other)
        return list(found)[1:]

    def tree(self, *, down: bool = False) -> Iterator[Line]:
        """Yield the start and what is behind it (or was made from it), depth first, each unfolded once."""
        seen: set[str] = set()
        stack = [(0, self.nodes[self.start], _own(self.nodes[self.start]))]
        while stack:
            depth, node, reference = stack.pop()
            repeated = node.record_digest in seen
            seen.add(node.record_digest)
            yield Line(depth, node, reference, repeated)
            if repeated:
                continue
            ahead = (self.children if down else self.parents).get(node.record_digest, ())
            stack += [
                (depth + 1, self.nodes[edge.child if down else edge.parent], edge.reference)
                for edge in reversed(ahead)
            ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values: nodes in the order in which they came from each other, and edges."""
        return {
            "start": self.start,
            "nodes": [node.to_dict() for node in self.ordered()],
            "edges": [edge.to_dict() for edge in self.edges],
        }


@dataclass(frozen=True)
class Records:
    """Every record of a store and its ledger, looked up without asking either again.

    Attributes:
        nodes: By record digest.
        edges: From each to those that it names as inputs.
        originals: From each to the one whose files it only names again.
    """

    nodes: Mapping[str, Node]
    edges: Sequence[Edge]
    originals: Sequence[Edge] = ()

    @classmethod
    def of(cls, present: Iterable[Head], gone: Iterable[Head]) -> Self:
        """Return the records with these heads."""
        nodes = [*(_node(head, "present") for head in present), *(_node(head, "gone") for head in gone)]
        edges = [
            edge for node in nodes if node.head is not None for edge in edges_of(node.head, originals=True)
        ]
        return cls(
            {node.record_digest: node for node in nodes},
            [edge for edge in edges if edge.kind == "input"],
            [edge for edge in edges if edge.kind == "original"],
        )

    @cached_property
    def children(self) -> dict[str, list[Edge]]:
        """The edges to what names each node as an input."""
        return _by((edge.parent, edge) for edge in self.edges)

    @cached_property
    def repeated(self) -> dict[str, list[Edge]]:
        """The edges to what names the files of each node again."""
        return _by((edge.parent, edge) for edge in self.originals)

    def named_by(self, digest: str, *, originals: bool) -> list[Edge]:
        """Return the edges to what names a node."""
        found = self.children.get(digest, [])
        return [*found, *self.repeated.get(digest, ())] if originals else found


def ancestors(
    store: Store, start: Record | Head, *, originals: bool = False, known: Records | None = None
) -> Graph:
    """Return an artifact and everything it came from.

    Args:
        store: That knows it.
        start: The artifact.
        originals: Whether the artifacts whose files others only name again belong to it, and their ancestors.
        known: The records of the store, where they are at hand.
    """
    head = _head(start)
    nodes = {head.record_digest: _start(store, head, known)}
    edges: list[Edge] = []
    waiting = deque(nodes.values())
    while waiting:
        node = waiting.popleft()
        for edge in [] if node.head is None else edges_of(node.head, originals=originals):
            edges.append(edge)
            if edge.parent not in nodes:
                there = None if known is None else known.nodes.get(edge.parent)
                nodes[edge.parent] = parent = there or _parent(store, node, edge)
                waiting.append(parent)
    return Graph(head.record_digest, nodes, tuple(edges))


def descendants(
    store: Store, start: Record | Head, *, originals: bool = False, known: Records | None = None
) -> Graph:
    """Return an artifact and everything that was made from it, also what is gone.

    Args:
        store: That knows it.
        start: The artifact.
        originals: Whether records that name its files again belong to it, and their descendants.
        known: The records of the store, where they are at hand.
    """
    head = _head(start)
    known = known or all_records(store)
    nodes = {head.record_digest: known.nodes.get(head.record_digest) or _node(head, "gone")}
    edges: list[Edge] = []
    waiting = deque(nodes)
    while waiting:
        for edge in known.named_by(waiting.popleft(), originals=originals):
            edges.append(edge)
            if edge.child not in nodes:
                nodes[edge.child] = known.nodes[edge.child]
                waiting.append(edge.child)
    return Graph(head.record_digest, nodes, tuple(edges))


def both_ways(
    store: Store, start: Record | Head, *, originals: bool = False, known: Records | None = None
) -> Graph:
    """Return an artifact with everything it came from and everything that was made from it.

    What a descendant came from beside it is no part of it. Arguments are those of `ancestors`.
    """
    up = ancestors(store, start, originals=originals, known=known)
    down = descendants(store, start, originals=originals, known=known)
    return Graph(up.start, {**down.nodes, **up.nodes}, (*up.edges, *down.edges))


def all_records(store: Store) -> Records:
    """Return every record that the store or its ledger knows."""
    heads = {head.record_digest: head for head in store.heads()}
    gone = store.remembered(digest for digest in store.ledger.digests() if digest not in heads)
    return Records.of(heads.values(), gone.values())


def edges_of(head: Head, *, originals: bool = False) -> list[Edge]:
    """Return the edges from a record to those that it names."""
    edges = [Edge(ref.record_digest, head.record_digest, ref) for ref in head.inputs]
    if originals and (origin := head.original) is not None:
        reference = InputRef(
            asset=origin.asset,
            version=origin.version,
            digest=head.digest,
            record_digest=origin.record_digest,
            role="original",
        )
        edges.append(Edge(origin.record_digest, head.record_digest, reference, "original"))
    return edges


def _start(store: Store, head: Head, known: Records | None) -> Node:
    if known is not None and (node := known.nodes.get(head.record_digest)) is not None:
        return node
    return _node(head, "gone" if store.head(head.experiment, _own(head)) is None else "present")


def _parent(store: Store, child: Node, edge: Edge) -> Node:
    reference, experiment = edge.reference, child.experiment
    if edge.kind == "original":
        assert child.head is not None
        assert child.head.original is not None
        experiment = child.head.original.experiment
    if (head := store.head(experiment, reference)) is not None:
        return _node(head, "present")
    if (head := store.remembered([reference.record_digest]).get(reference.record_digest)) is not None:
        return _node(head, "gone")
    return Node(
        experiment,
        reference.asset,
        reference.version,
        reference.digest,
        reference.record_digest,
        "unknown",
        None,
    )


def _node(head: Head, state: State) -> Node:
    return Node(head.experiment, head.asset, head.version, head.digest, head.record_digest, state, head)


def _head(start: Record | Head) -> Head:
    return start if isinstance(start, Head) else Head.of(start)


def _own(named: Head | Node) -> InputRef:
    return InputRef(
        asset=named.asset,
        version=named.version,
        digest=named.digest,
        record_digest=named.record_digest,
        role="self",
    )


def _by(pairs: Iterable[tuple[str, Edge]]) -> dict[str, list[Edge]]:
    found: dict[str, list[Edge]] = {}
    for key, edge in pairs:
        found.setdefault(key, []).append(edge)
    return found
