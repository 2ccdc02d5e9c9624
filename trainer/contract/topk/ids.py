"""Token ids by their frequency: pages of 256 numbers, the likeliest first.

An id is a page and a number in it. Page 0 is that of a context: ids that often stand beside the position's
likeliest id, most frequent first. Contexts are the likeliest ids that are frequent themselves, and one for
all other positions. The pages after it are global, ids by falling frequency, then all others. The last page,
`WIDE`, takes two bytes more and reaches any rank.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.columns import ColumnReader, ColumnWriter
from trainer.contract.topk.errors import StoreError

LOCAL = 1
PAGE = 256
WIDE = 255
GLOBAL_PAGES = 64
MOST_CONTEXTS = 254
CONTEXT_TOKENS = 48
LISTED_FROM = 3
"""A likeliest id is a context from so many positions on, an id on its list from so many times beside it.
A list costs two bytes an id, and what it saves has to be more."""
_LISTED = LOCAL * PAGE


@dataclass(frozen=True)
class IdTable:
    """The frequencies of a shard, as they were known when the table was made.

    Attributes:
        vocabulary: Ids are below it.
        order: All ids, the most frequent first, int32 [V].
        listed: So many of them have a frequency; the rest follow by id.
        contexts: Likeliest ids that have a list of their own, ascending, int32 [C].
        lists: Ids of each context's pages, -1 behind its last, int32 [C + 1, `LOCAL` * 256]; the last row
            belongs to all other positions.
    """

    vocabulary: int
    order: NDArray[np.int32]
    listed: int
    contexts: NDArray[np.int32]
    lists: NDArray[np.int32]

    @cached_property
    def rank(self) -> NDArray[np.int32]:
        """Place of each id in the order, int32 [V]."""
        rank = np.empty(self.vocabulary, np.int32)
        rank[self.order] = np.arange(self.vocabulary, dtype=np.int32)
        return rank

    @cached_property
    def _flat(self) -> NDArray[np.int32]:
        return np.concatenate([np.maximum(self.lists.ravel(), 0), self.order])

    @cached_property
    def _context_of(self) -> NDArray[np.int32]:
        """Offset of an id's list in the flat table, int32 [V]."""
        offsets = np.full(self.vocabulary, len(self.contexts) * _LISTED, np.int32)
        offsets[self.contexts] = np.arange(len(self.contexts), dtype=np.int32) * _LISTED
        return offsets

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sorted keys (list, id) and the place of each in the flat table."""
        rows, columns = np.nonzero(self.lists >= 0)
        keys = rows * np.int64(self.vocabulary) + self.lists[rows, columns]
        order = np.argsort(keys, kind="stable")
        return keys[order], (rows * _LISTED + columns)[order]

    def offsets(self, likeliest: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return where the lists begin that belong to positions with these likeliest ids."""
        return self._context_of[likeliest]

    @property
    def other(self) -> np.int32:
        """Where the list of all other positions begins."""
        return np.int32(len(self.contexts) * _LISTED)

    def pages(
        self, ids: NDArray[np.int32], offsets: NDArray[np.int32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
        """Return page and number of ids, and rank >> 8 of those on the `WIDE` page, in order.

        Args:
            ids: [m].
            offsets: Of the lists, [m].
        """
        rank = self.rank[ids].astype(np.int64)
        wide = rank >= GLOBAL_PAGES * PAGE
        page = np.where(wide, WIDE, (rank >> 8) + LOCAL)
        keys, places = self._places
        if len(keys):
            key = (offsets // _LISTED).astype(np.int64) * self.vocabulary + ids
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            local = keys[at] == key
            place = places[at] - offsets
            page, low = np.where(local, place >> 8, page), np.where(local, place, rank)
            wide &= ~local
        else:
            low = rank
        return page.astype(np.uint8), (low & 255).astype(np.uint8), rank[wide] >> 8

    def ids(
        self,
        page: NDArray[np.uint8],
        low: NDArray[np.uint8],
        offsets: NDArray[np.int32] | np.int32,
        wide: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Undo `pages`.

        Args:
            page: Any shape.
            low: Number in the page, of the same shape.
            offsets: Of the lists, of a shape that broadcasts.
            wide: Rank >> 8 of those on the `WIDE` page, in order.

        Raises:
            StoreError: If a number stands for no id.
        """
        begin = np.int32(self.lists.size - _LISTED)  # as if the local pages were the first of the order
        numbers = page.astype(np.int32)
        numbers <<= 8
        numbers |= low
        numbers += begin
        numbers += (page < LOCAL) * (offsets - begin)
        if len(wide):
            places = np.flatnonzero(page == WIDE)
            ranks = low.reshape(-1)[places] | (wide << 8)
            if ranks.max() >= self.vocabulary:
                raise StoreError(f"rank {int(ranks.max())} in a vocabulary of {self.vocabulary}")
            numbers.reshape(-1)[places] = ranks + self.lists.size
        try:
            return self._flat.take(numbers)
        except IndexError as error:
            raise StoreError("an id behind the last of its table") from error


def plain_table(vocabulary: int) -> IdTable:
    """Return the table of a shard that has none: ids are their own ranks."""
    empty = np.full((1, _LISTED), -1, np.int32)
    return IdTable(vocabulary, np.arange(vocabulary, dtype=np.int32), 0, np.zeros(0, np.int32), empty)


def count_table(vocabulary: int, ids: NDArray[np.int32], draws: NDArray[np.int32]) -> IdTable:
    """Make a table of what was seen.

    Args:
        vocabulary: Ids are below it.
        ids: By falling probability, -1 behind the last, [n, K].
        draws: Ids drawn from tails, -1 where there is none.
    """
    counts = np.bincount(ids[ids >= 0], minlength=vocabulary)
    counts += np.bincount(draws[draws >= 0], minlength=vocabulary)
    counts[counts < 2] = 0  # seen once is no reason to be listed: that costs what it saves
    order: NDArray[np.int32] = np.argsort(-counts, kind="stable").astype(np.int32)
    likeliest = ids[:, 0]
    heads = np.bincount(likeliest[likeliest >= 0], minlength=vocabulary)
    frequent = np.argsort(-heads, kind="stable")[:MOST_CONTEXTS]
    contexts: NDArray[np.int32] = np.sort(frequent[heads[frequent] >= CONTEXT_TOKENS]).astype(np.int32)
    lists = np.full((len(contexts) + 1, _LISTED), -1, np.int32)
    row_of = np.full(vocabulary, len(contexts))
    row_of[contexts] = np.arange(len(contexts))
    rows = np.where(likeliest >= 0, row_of[likeliest], len(contexts))
    for row in range(len(lists)):
        beside = ids[rows == row, 1:]
        found, times = np.unique(beside[beside >= 0], return_counts=True)
        found, times = found[times >= LISTED_FROM], times[times >= LISTED_FROM]
        best = found[np.argsort(-times, kind="stable")][:_LISTED]
        lists[row, : len(best)] = best
    return IdTable(vocabulary, order, int(np.count_nonzero(counts)), contexts, lists)


def pack_table(table: IdTable) -> bytes:
    """Return a table as bytes."""
    columns = ColumnWriter()
    lengths = (table.lists >= 0).sum(axis=1)
    columns.add_numbers(np.array([table.listed, len(table.contexts)]))
    columns.add_numbers(table.order[: table.listed])
    columns.add_numbers(table.contexts)
    columns.add_numbers(lengths)
    columns.add_numbers(table.rank[table.lists[table.lists >= 0]])
    return columns.content()


def unpack_table(payload: memoryview, vocabulary: int) -> IdTable:
    """Undo `pack_table`.

    Raises:
        StoreError: If it is damaged.
    """
    columns = ColumnReader(payload)
    listed, many = (int(number) for number in columns.take_numbers(2))
    if listed > vocabulary or many > MOST_CONTEXTS:
        raise StoreError(f"{listed} ids and {many} contexts are more than a table has")
    head = columns.take_numbers(listed)
    contexts = columns.take_numbers(many)
    lengths = columns.take_numbers(many + 1)
    if (lengths > _LISTED).any():
        raise StoreError("a list is longer than its pages")
    ranks = columns.take_numbers(int(lengths.sum()))
    columns.end()
    for name, numbers in (("id", head), ("context", contexts), ("rank", ranks)):
        if len(numbers) and numbers.max() >= vocabulary:
            raise StoreError(f"{name} {int(numbers.max())} in a vocabulary of {vocabulary}")
    rest = np.ones(vocabulary, bool)
    rest[head] = False
    order = np.concatenate([head, np.flatnonzero(rest)]).astype(np.int32)
    if len(order) != vocabulary:
        raise StoreError("an id is twice in the order")
    lists = np.full((many + 1, _LISTED), -1, np.int32)
    lists[np.arange(_LISTED) < lengths[:, None]] = order[ranks]
    return IdTable(vocabulary, order, listed, contexts.astype(np.int32), lists)
