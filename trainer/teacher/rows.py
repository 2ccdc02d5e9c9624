"""Which tokens a local teacher runs together: a row a sequence, and one row for those that share a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAD_TO = 8
"""Rows of a batch are padded to a multiple of this; attention kernels like aligned masks."""


@dataclass
class Row:
    """One row of a forward pass.

    Attributes:
        tokens: Ids: what is shared, then one branch after the other.
        positions: Of each token in its own sequence.
        branch: Of each token: 0 shared, 1… branches that do not see each other.
        reads: (number of a sequence, places in the row that are read for it).
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    reads: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def tree(self) -> bool:
        """Whether it has branches."""
        return self.branch[-1] > 0


@dataclass(frozen=True)
class Batch:
    """Rows of a kind, padded to one width.

    Attributes:
        rows: The rows.
        tokens: int64 `[B, S]`.
        positions: int64 `[B, S]`.
        branch: int64 `[B, S]`, -1 where padded.
    """

    rows: Sequence[Row]
    tokens: Tensor
    positions: Tensor
    branch: Tensor


def plan(sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], *, share: bool) -> list[Row]:
    """Lay sequences out in rows; what follows the last wanted position is not run.

    Args:
        sequences: Token ids.
        wanted: Positions of each that are read, rising; a sequence without any gets no row.
        share: Run once what sequences have in common up to their first wanted position. Sequences that are
            read at the same prompt's end are completions of one prompt.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, positions in enumerate(wanted):
        if len(positions):
            prompt = tuple(sequences[number][: positions[0] + 1])
            groups.setdefault(prompt if share else (*prompt, -1 - number), []).append(number)
    return [row for numbers in groups.values() for row in _rows(numbers, sequences, wanted)]


def _rows(
    numbers: Sequence[int], sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
) -> Iterator[Row]:
    run: dict[tuple[int, ...], list[int]] = {}  # what is run alike is run once
    for number in numbers:
        run.setdefault(tuple(sequences[number][: wanted[number][-1] + 1]), []).append(number)
    if len(run) == 1:
        for tokens, alike in run.items():
            row = Row(list(tokens), list(range(len(tokens))), [0] * len(tokens))
            row.reads += [(number, list(wanted[number])) for number in alike]
            yield row
        return
    prompt = wanted[numbers[0]][0] + 1
    row = Row(list(sequences[numbers[0]][:prompt]), list(range(prompt)), [0] * prompt)
    for branch, (tokens, alike) in enumerate(run.items(), start=1):
        shift = len(row.tokens) - prompt
        row.tokens += tokens[prompt:]
        row.positions += range(prompt, len(tokens))
        row.branch += [branch] * (len(tokens) - prompt)
        row.reads += [
            (number, [at if at < prompt else at + shift for at in wanted[number]]) for number in alike
        ]
    yield row


def batches(rows: Sequence[Row], most_tokens: int) -> Iterator[Batch]:
    """Cut rows into batches, longest first and trees apart, so that little of a batch is padding.

    Args:
        rows: The rows.
        most_tokens: Positions of a batch, padding included; a single longer row is a batch of its own.
    """
    for tree in (False, True):
        ordered = sorted((row for row in rows if row.tree is tree), key=lambda row: -len(row.tokens))
        start = 0
        while start < len(ordered):
            width = -(-len(ordered[start].tokens) // PAD_TO) * PAD_TO
            chosen = ordered[start : start + max(1, most_tokens // width)]
            yield _padded(chosen, width)
            start += len(chosen)


def _padded(rows: Sequence[Row], width: int) -> Batch:
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    positions, branch = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for place, row in enumerate(rows):
        length = len(row.tokens)
        tokens[place, :length] = torch.tensor(row.tokens)
        positions[place, :length] = torch.tensor(row.positions)
        branch[place, :length] = torch.tensor(row.branch)
    return Batch(rows, tokens, positions, branch)
