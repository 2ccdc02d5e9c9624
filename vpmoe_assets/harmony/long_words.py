"""What `openai-harmony` cannot render in reasonable time: words whose byte pairs it merges quadratically.

A word is a piece that the o200k pattern splits off: a run of letters, of signs, of white space. tiktoken,
which makes the training data, merges long pieces in time `n log n`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from unicodedata import category

from vpmoe_assets.errors import RowError

TOO_SLOW = "words so long that openai-harmony takes minutes for them"

_SHORT = 500
"""Bytes of a word that cost what its length costs."""

_MOST = 16_000_000
"""Squared bytes of the longer words of a conversation, summed: 25 to 50 ms of one core, for one of 4,000."""

_LONG_RUNS = re.compile(rf"\S{{{_SHORT // 4},}}|\s{{{_SHORT // 4},}}")


class OracleTooSlowError(RowError):
    """A conversation has words that `openai-harmony` takes too long for."""


def require_quick(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse messages that `openai-harmony` would take long for; the check itself is linear.

    Args:
        messages: As stored in `messages_json`.

    Raises:
        OracleTooSlowError: Naming the longest word's bytes.
    """
    cost = longest = 0
    for text in _texts(messages):
        for size in _long_words(text):
            cost, longest = cost + size * size, max(longest, size)
            if cost > _MOST:
                raise OracleTooSlowError(
                    f"openai-harmony takes minutes for words as long as some here ({longest} bytes); "
                    "break or remove them"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _long_words(text: str) -> Iterator[int]:
    """Bytes of the words longer than `_SHORT`; runs of letters of mixed case count as one word."""
    for run in _LONG_RUNS.finditer(text):
        for kind, characters in groupby(run[0], _kind):
            size = len("".join(characters).encode("utf-8", "replace"))
            if size > _SHORT and kind != "N":  # digits are pieces of three
                yield size


def _kind(character: str) -> str:
    """`L` for letters and marks, `N` for numbers, `P` for all else."""
    major = category(character)[0]
    return "L" if major in "LM" else "N" if major == "N" else "P"
