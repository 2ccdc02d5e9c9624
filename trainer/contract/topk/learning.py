"""When a shard's table of ids is made: from its first block, and again when more is known."""

from trainer.contract.topk.ids import IdTable, count_table, plain_table
from trainer.contract.topk.records import TopKRecords, joined

MADE_AT = (0, 1 << 15, 1 << 17)
"""Tables are made before the block that begins at or after so many positions."""
SAMPLED_CELLS = 1 << 22
"""Ids that are kept to count; the memory that it takes."""


class TableMaker:
    """The table of a shard that grows, a function of the records before it alone.

    Attributes:
        table: The latest one; ids by themselves before the first.
    """

    def __init__(self, vocabulary: int):
        self.table = plain_table(vocabulary)
        self._vocabulary = vocabulary
        self._made = self._tokens = self._cells = 0
        self._sample: list[TopKRecords] = []

    @property
    def learning(self) -> bool:
        """Whether another table will be made."""
        return self._made < len(MADE_AT)

    @property
    def due(self) -> bool:
        """Whether one is to be made now."""
        return self.learning and self._tokens >= MADE_AT[self._made]

    def learn(self, records: TopKRecords) -> None:
        """Take a block into account."""
        self._tokens += len(records)
        if self._cells < SAMPLED_CELLS:
            self._sample.append(records)
            self._cells += records.ids.size + records.draws.size

    def make(self, first: TopKRecords) -> IdTable:
        """Make a table of all that was learned, or of the first block where that is nothing."""
        seen = joined(self._sample or [first])
        self.take(count_table(self._vocabulary, seen.ids, seen.draws))
        return self.table

    def take(self, table: IdTable) -> None:
        """Go on with a table that was made before."""
        self.table = table
        self._made += 1
        if not self.learning:
            self._sample = []
