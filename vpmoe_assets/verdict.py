"""What a check found."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        passed: Whether everything is as it must be.
        description: One sentence for a reader; names the first fault.
        metadata: Numbers and names worth keeping.
    """

    passed: bool
    description: str
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, faults: Sequence[str], good: str, metadata: Mapping[str, Any]) -> Self:
        """Return the verdict over faults that were looked for.

        Args:
            faults: In the order they were found; the first one and their number are the description.
            good: The description where there is none.
            metadata: Numbers and names worth keeping; up to 20 faults join them.
        """
        if not faults:
            return cls(True, good, metadata)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return cls(False, faults[0] + more, {**metadata, "faults": list(faults[:20])})
