"""JSON from outside: whatever is wrong with it is a `JsonError`, however it was made to be wrong."""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MOST_LINE_BYTES = 64 << 20
"""Most bytes of a line of JSON that is read: a row is a document, and none is as long."""


class JsonError(ValueError):
    """A text is no JSON that is read here; the message says why."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        JsonError: It is no JSON, no Unicode, or nested more deeply than this Python reads; `json.loads`
            raises a `RecursionError` there, which whoever expects damage does not expect.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise JsonError(str(error)) from error
    except RecursionError:
        raise JsonError("nested too deeply") from None


def json_lines(
    stream: BinaryIO,
    *,
    parse: Callable[[bytes], Any] = parse_json,
    seen: Callable[[bytes], object] = lambda _: None,
    most: int = MOST_LINE_BYTES,
) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and value of every line of a file that is not blank, in memory for one line.

    Args:
        stream: Opened for reading bytes.
        parse: Returns the value of a line, or raises a `ValueError`.
        seen: Called with the bytes of every line.
        most: Bytes of a line.

    Raises:
        JsonError: A line is no JSON, or longer; no more than that of it was read. The message names it.
    """
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            raise JsonError(f"line {number}: more than {most} bytes; no row is as long")
        seen(line)
        if not line.strip():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            raise JsonError(f"line {number}: not valid JSON ({error})") from error
        yield number, value
