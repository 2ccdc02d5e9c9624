"""What commands print: strict JSON with nothing lost, and every text on every stream."""

import datetime
import json
import math
import sys
from decimal import Decimal
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.printed import exact_json, print_whatever_comes

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def strict(text: str) -> Any:
    """Read JSON as a parser does that knows nothing beyond RFC 8259."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def same(value: Any, read: Any) -> bool:
    """Whether what was read says all that the value is."""
    if isinstance(value, dict):
        return value.keys() == read.keys() and all(same(value[key], read[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(read) and all(map(same, value, read))
    if isinstance(value, bytes):
        return bytes.fromhex(read) == value
    if isinstance(value, datetime.datetime):
        return datetime.datetime.fromisoformat(read) == value
    if isinstance(value, float):
        return math.isnan(float(read)) if math.isnan(value) else float(read) == value
    return type(value) is type(read) and value == read


@settings(max_examples=60)
@given(value=VALUES)
def test_strict_json_says_everything(value: Any) -> None:
    assert same(value, strict(exact_json(value)))


def test_keys_that_are_no_strings_are_told_as_values_are_and_never_merged() -> None:
    day = datetime.date(2020, 1, 2)
    assert strict(exact_json({1: "a", day: "b", math.nan: "c", Decimal("1.50"): "d"})) == {
        "1": "a",
        "2020-01-02": "b",
        "NaN": "c",
        "1.50": "d",
    }
    with pytest.raises(ValueError, match="same text"):
        exact_json({1: "a", "1": "b"})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_every_text_can_be_printed_and_bytes_of_file_names_come_out_as_they_are(
    tmp_path, monkeypatch, encoding
) -> None:
    path = tmp_path / "out"
    with path.open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print_whatever_comes()
        print("a\udcff≠")
    rest = "≠".encode() if encoding == "utf-8" else b"\\u2260"
    assert path.read_bytes() == b"a\xff" + rest + b"\n"
