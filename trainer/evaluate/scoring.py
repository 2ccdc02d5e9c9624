"""Log-probabilities of given continuations, with shared prefixes computed once.

What is asked for is a list of groups; a group is the sequences of one item (the choices of a question), which
mostly agree up to their last few tokens. Each group becomes one row where the model can share prefixes:
prefix, then the continuations side by side, none seeing another. Elsewhere sequences that differ in their
last token alone still share their row, for that token is never read. Rows of equal kind are sorted by length
and cut into batches, so that little of a batch is padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.evaluate.models import LanguageModel
from trainer.evaluate.suite import Batching

PAD_TO = 8
"""Rows of a batch are padded to a multiple of this; attention kernels like aligned masks."""


@dataclass(frozen=True)
class Scored:
    """A sequence and the part of it that is scored.

    Attributes:
        tokens: Ids, BOS first.
        start: Index of the first scored token, at least 1: a token is scored by what stands before it.
    """

    tokens: Sequence[int]
    start: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.tokens):
            raise ValueError(f"nothing to score from index {self.start} of {len(self.tokens)} tokens")


@dataclass(frozen=True)
class Scores:
    """Scores of the scored tokens of one sequence.

    Attributes:
        logprobs: float32 `[n]`, natural logarithm.
        greedy: bool `[n]`, whether each token is the model's first choice.
    """

    logprobs: NDArray[np.float32]
    greedy: NDArray[np.bool_]

    @property
    def total(self) -> float:
        """Log-probability of the whole part, summed in double precision."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean_nll(self) -> float:
        """Mean cross-entropy per token in nats."""
        return -self.total / len(self.logprobs)


@dataclass
class _Row:
    """One row of a forward pass and what is read from it."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    reads: list[tuple[tuple[int, int], list[int], list[int]]] = field(default_factory=list)
    """((group, sequence), places in the row, target ids) for every sequence it serves."""

    @property
    def tree(self) -> bool:
        return self.branch[-1] > 0


def score(
    model: LanguageModel,
    groups: Sequence[Sequence[Scored]],
    batching: Batching,
    *,
    share: bool = True,
    tick: Callable[[int], None] = lambda _: None,
) -> list[list[Scores]]:
    """Score every sequence of every group.

    Args:
        model: The model.
        groups: Sequences that belong together, mostly with a long prefix in common.
        batching: Sizes of batches; results do not depend on them beyond round-off.
        share: Whether to share prefixes where the model can.
        tick: Called after each batch with the number of its rows.

    Returns:
        Scores in the order of `groups`.
    """
    rows: list[_Row] = []
    for number, group in enumerate(groups):
        rows += _plan(number, group, share and model.shares_prefixes)
    results: list[list[Scores | None]] = [[None] * len(group) for group in groups]
    for batch in _batches(rows, batching):
        for (group_number, place), scores in _run(model, batch):
            results[group_number][place] = scores
        tick(len(batch))
    return [[scores for scores in group if scores is not None] for group in results]


def count_rows(model: LanguageModel, groups: Sequence[Sequence[Scored]]) -> int:
    """How many rows `score` will run, for a progress bar."""
    return sum(len(_plan(number, group, model.shares_prefixes)) for number, group in enumerate(groups))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    first, *others = sequences
    length = min(map(len, sequences))
    for other in others:
        place = 0
        while place < length and first[place] == other[place]:
            place += 1
        length = place
    return length


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common suffix."""
    return common_prefix([sequence[::-1] for sequence in sequences])


def _plan(number: int, group: Sequence[Scored], share: bool) -> list[_Row]:
    prefix = common_prefix([list(item.tokens) for item in group])
    branches = [list(item.tokens[prefix:-1]) for item in group]
    separate: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(group):
        separate.setdefault(tuple(item.tokens[:-1]), []).append(place)
    shared_size = prefix + sum(map(len, branches))
    if not share or len(separate) == 1 or shared_size >= sum(map(len, separate)):
        return [_plain_row(number, group, tokens, places) for tokens, places in separate.items()]
    row = _Row(list(group[0].tokens[:prefix]), list(range(prefix)), [0] * prefix)
    for place, (item, branch) in enumerate(zip(group, branches, strict=True)):
        begin = len(row.tokens)
        row.tokens += branch
        row.positions += range(prefix, prefix + len(branch))
        row.branch += [place + 1] * len(branch)
        reads = range(item.start - 1, len(item.tokens) - 1)
        where = [at if at < prefix else begin + at - prefix for at in reads]
        row.reads.append(((number, place), where, list(item.tokens[item.start :])))
    return [row]


def _plain_row(number: int, group: Sequence[Scored], tokens: tuple[int, ...], places: list[int]) -> _Row:
    row = _Row(list(tokens), list(range(len(tokens))), [0] * len(tokens))
    for place in places:
        item = group[place]
        where = list(range(item.start - 1, len(item.tokens) - 1))
        row.reads.append(((number, place), where, list(item.tokens[item.start :])))
    return row


def _batches(rows: Sequence[_Row], batching: Batching) -> Iterator[list[_Row]]:
    for tree in (False, True):
        ordered = sorted((row for row in rows if row.tree is tree), key=lambda row: -len(row.tokens))
        start = 0
        while start < len(ordered):
            width = _padded(len(ordered[start].tokens))
            size = max(1, min(batching.rows, batching.tokens // width))
            yield ordered[start : start + size]
            start += size


def _padded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO


def _run(model: LanguageModel, batch: list[_Row]) -> Iterator[tuple[tuple[int, int], Scores]]:
    width = _padded(len(batch[0].tokens))
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    positions, branch = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for place, row in enumerate(batch):
        length = len(row.tokens)
        tokens[place, :length] = torch.tensor(row.tokens)
        positions[place, :length] = torch.tensor(row.positions)
        branch[place, :length] = torch.tensor(row.branch)
    if batch[0].tree:
        hidden = model.hidden_trees(tokens, positions, branch)
    else:
        hidden = model.hidden(tokens, torch.tensor([len(row.tokens) for row in batch]))
    reads = [(place, *read) for place, row in enumerate(batch) for read in row.reads]
    at_row = torch.tensor([place for place, _, where, _ in reads for _ in where], device=hidden.device)
    at_token = torch.tensor([at for _, _, where, _ in reads for at in where], device=hidden.device)
    targets = torch.tensor([target for _, _, _, wanted in reads for target in wanted])
    logprobs, greedy = model.score(hidden[at_row, at_token], targets)
    start = 0
    for _, who, where, _ in reads:
        stop = start + len(where)
        yield who, Scores(logprobs[start:stop].numpy(), greedy[start:stop].numpy())
        start = stop
