r"""Texts with a very long run of white space: the one thing that the o200k pattern cannot cross.

The pattern's look-ahead (`\s+(?!\S)`) remembers a place to go back to for every character of such a run, and
the engine that tiktoken is built on keeps at most a million of them: beyond, it fails, and through
`encode_ordinary` even panics, with an exception that no `except Exception` sees. What the pattern would have
found there is known, though: of a run that does not end in a line break, everything but its last character,
or all of it at the text's end, is one piece. So a text is encoded around such pieces, with the ids that an
engine without the limit would give.
"""

import re
from collections.abc import Iterator
from functools import cache

LONGEST_RUN = 100_000
"""Characters of white space in a row that are left to the pattern."""

# White space to Rust's regex crate (the Unicode property), without line feed and carriage return.
_SPACES = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def segments(text: str, longest: int = LONGEST_RUN) -> Iterator[tuple[str, bool]]:
    """Split a text where the pattern splits it in any case.

    Args:
        text: Of any length.
        longest: Characters of white space in a row, 2 at least, from which on a run is cut out.

    Yields:
        Parts in order, and whether a part is one piece: to be encoded without the pattern.
    """
    if len(text) < longest:
        yield text, False
        return
    done = 0
    for run in _runs(longest).finditer(text):
        follows = text[run.end() : run.end() + 1]
        if follows in ("\r", "\n"):
            continue  # with its line breaks one piece, by a part of the pattern that never goes back
        end = run.end() - (follows != "")
        if run.start() > done:
            yield text[done : run.start()], False
        yield text[run.start() : end], True
        done = end
    if done < len(text):
        yield text[done:], False


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library written in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


@cache
def _runs(longest: int) -> re.Pattern[str]:
    return re.compile(f"[{_SPACES}]{{{longest},}}")
