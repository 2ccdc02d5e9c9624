"""What commands print: JSON that loses nothing, and text that every stream takes."""

import codecs
import json
import math
import os
import sys
from typing import Any

_ERRORS = "vpmoe.printed"


def exact_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as strict JSON (RFC 8259) in ASCII, with nothing of it lost.

    What JSON has no form for becomes a string: NaN and the infinities `"NaN"`, `"Infinity"`, `"-Infinity"`
    (as in the JSON mapping of protobuf), bytes their hexadecimal digits, times their ISO form, all else what
    `str` says. Integers keep every digit.

    Args:
        value: Anything, containers of anything included. Keys that are no strings are written as their values
            would be.
        indent: Spaces per level; None gives one line.

    Raises:
        ValueError: Two keys of one object have the same text.
    """
    return json.dumps(_exact(value), indent=indent, allow_nan=False)


def _exact(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _of_no_number(value)
    if isinstance(value, dict):
        entries = [(key if isinstance(key, str) else _key(key), _exact(each)) for key, each in value.items()]
        if len(found := dict(entries)) < len(entries):
            raise ValueError(f"keys of one object have the same text: {[key for key, _ in entries]}")
        return found
    if isinstance(value, list | tuple | set | frozenset):
        return [_exact(each) for each in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _key(key: Any) -> str:
    plain = _exact(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _of_no_number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def print_refusal(error: Exception) -> None:
    """Say on standard error, in one line, why a command does not do what it was asked."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def print_whatever_comes() -> None:
    """Let standard output and standard error take every text, whatever the locale.

    The bytes of a file name that are not UTF-8 come out as they are, a character that the stream's encoding
    does not have as its escape. What a stream is told that was closed from the start is lost, as was asked;
    no file that is opened later gets its number.
    """
    codecs.register_error(_ERRORS, _written)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            if not _is_open(number):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        if mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    written = b""
    for character in text:
        if (
            0xDC80 <= ord(character) <= 0xDCFF
        ):  # PEP 383: a byte that the file system's encoding does not have
            written += bytes([ord(character) - 0xDC00])
        else:
            written += character.encode("ascii", errors="backslashreplace")
    return written, error.end
