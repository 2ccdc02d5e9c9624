"""What is said when an input is not what it must be."""


class DataError(ValueError):
    """An input, or an existing output, is not usable; the message names it and says what to do."""


class RowError(DataError):
    """One conversation breaks the format. The builder names shard, row and synth_id, and stops.

    Args:
        reason: What is wrong with this conversation, in words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShardRowError(DataError):
    """A build stopped at one row.

    Args:
        shard: Output shard number.
        where: The row in words, e.g. `row 17 (part-0.parquet, row 17)`.
        synth_id: Id of the row, None when it has none.
        reason: Why it was refused.
    """

    def __init__(self, shard: int, where: str, synth_id: str | None, reason: str) -> None:
        super().__init__(
            f"shard {shard:02d}, {where}, synth_id {synth_id!r}: {reason}. "
            "Nothing was published; correct or remove the row and build again."
        )
        self.arguments = (shard, where, synth_id, reason)

    def __reduce__(self) -> tuple[type, tuple[int, str, str | None, str]]:
        """Rebuild from the four arguments (not from the message), so that it crosses processes."""
        return type(self), self.arguments


class DonorError(DataError):
    """A donor is absent, damaged, or not the one that the experiment names; the message says what to do."""


class WorkerError(RuntimeError):
    """A worker process ended without a result."""
