"""How a command ends whose reader leaves early, as in `vpmoe ls | head -1`: without a word."""

import os
import sys
from collections.abc import Callable
from typing import TextIO

CLOSED_PIPE = 141
"""128 + SIGPIPE: the exit code of a program that the shell saw die of a closed pipe."""


def quiet_when_unread(command: Callable[[], int]) -> int:
    """Run a command that prints; where nobody reads on, end as other programs end.

    Not by SIGPIPE itself: that would also kill a process over any other pipe or socket that is closed, with
    work half done.

    Args:
        command: Returns the exit code, or raises `SystemExit`.

    Returns:
        The command's exit code; `CLOSED_PIPE`; or 1 where what it printed could not be written, as on a disk
        that is full.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except OSError as error:
        return leave_unprinted(error)


def leave_unprinted(error: OSError) -> int:
    """Send what is still to be printed nowhere (the interpreter flushes once more when it ends).

    Args:
        error: Of what could not be printed.

    Returns:
        `CLOSED_PIPE`, or 1 after a message where it was not for a pipe that nobody reads.
    """
    unread = isinstance(error, BrokenPipeError)
    _nowhere(sys.stdout)
    if not unread:
        try:
            print(
                f"error: the answer cannot be written: {error.strerror or error}", file=sys.stderr, flush=True
            )
        except OSError:
            _nowhere(sys.stderr)
    return CLOSED_PIPE if unread else 1


def _nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
