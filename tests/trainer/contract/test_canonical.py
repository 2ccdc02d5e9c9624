import enum
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.canonical import UnstableValueError, canonical_json, sha256_json

relaxed = settings(deadline=None, max_examples=60)  # a busy machine is slow, not wrong

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def shuffled(value: object) -> object:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@relaxed
@given(values)
def test_reads_back_equal_and_to_the_same_bytes(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@relaxed
@given(values)
def test_does_not_depend_on_the_order_of_keys(value):
    assert canonical_json(shuffled(value)) == canonical_json(value)


@relaxed
@given(values, values)
def test_different_values_have_different_hashes(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


@pytest.mark.parametrize(
    ("valid_fraction", "expected"),
    [
        (0.1, "faa2ee2ea0adc1b2dc2f171d31e4ab4d6b6a3a320d09a35776cceb34c006ecdc"),
        (0.001, "73f469ae8f3cdb1ddcd6219c2c90d095507048999c0d19da084423de048f91b0"),
    ],
)
def test_gives_the_published_hash_of_a_dataset_config(valid_fraction, expected):
    config = {
        "valid_fraction": valid_fraction,
        "hash": "blake2b-8",
        "loss_mask_alignment": "labels_shifted_with_pad",
        "eod_token_id": 199999,
        "roles_preserved": ["system", "developer", "user", "assistant"],
        "assistant_channels": ["analysis", "final"],
    }
    assert sha256_json(config) == expected


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
        (Path("x"), "Path"),
        (len, "builtin"),
        (lambda: 0, "function"),
        (object(), "object"),
        (np.float64(1), "numpy.float64"),
        (Colour.RED, "Colour"),
        (1j, "complex"),
    ],
)
def test_refuses_what_has_no_stable_form_and_names_the_key_path(bad, found):
    with pytest.raises(UnstableValueError, match=r"^\$\.training\.optimizer\[1\]\.x: ") as error:
        canonical_json({"training": {"optimizer": [0, {"x": bad}]}})
    assert found in str(error.value)


def test_refuses_keys_that_are_no_strings():
    with pytest.raises(UnstableValueError, match=r"\$\.a: key 1 is int"):
        canonical_json({"a": {1: "x"}})


def test_refuses_a_value_that_contains_itself_but_not_one_that_occurs_twice():
    shared = {"x": 1}
    assert canonical_json([shared, shared]) == '[{"x":1},{"x":1}]'
    loop: list[object] = []
    loop.append({"again": loop})
    with pytest.raises(UnstableValueError, match="contains itself"):
        canonical_json(loop)


@relaxed
@given(values)
def test_the_indented_form_says_the_same(value):
    assert canonical_json(json.loads(canonical_json(value, indent=1))) == canonical_json(value)
