"""What a check found."""

from collections.abc import Mapping
from typing import Any, NamedTuple


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
