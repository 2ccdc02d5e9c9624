from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.contract.topk.distributions import (
    ADAPTIVE,
    IDENTITY,
    answer,
    assert_within,
    records,
    softmax,
)
from trainer.contract.topk.block import decode, encode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.ids import IdTable, count_table, pack_table, plain_table, unpack_table
from trainer.contract.topk.records import TopKRecords


def through(given: TopKRecords, identity: StoreIdentity, table: IdTable) -> TopKRecords:
    """Write records as a block and read them."""
    adaptive, error = identity.mass is not None, identity.logprob_error
    given.check(identity.topk, identity.tail_draws, identity.vocabulary, error)
    payload = memoryview(encode(given, table, error, adaptive))
    return decode(payload, len(given), identity.topk, identity.tail_draws, table, error, adaptive)


@st.composite
def answers(draw: st.DrawFn) -> tuple[TopKRecords, StoreIdentity]:
    """Records of any teacher: flat, peaked, tied and impossible ids, few or all of them kept."""
    vocabulary = draw(st.integers(1, 40))
    identity = replace(
        IDENTITY,
        vocabulary=vocabulary,
        topk=draw(st.integers(1, vocabulary)),
        mass=draw(st.sampled_from([None, 0.3, 0.95, 1.0])),
        tail_draws=draw(st.sampled_from([0, 1, 8])),
        logprob_error=draw(st.sampled_from([0.001, 0.01, 0.05])),
    )
    n = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 30.0, 300.0]))
    logits = scale * rng.normal(size=(n, vocabulary))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    probabilities = np.maximum(softmax(logits), 1e-44)
    return answer(
        probabilities / probabilities.sum(axis=1, keepdims=True), np.arange(n) % vocabulary, identity
    ), identity


@settings(max_examples=80, deadline=None)
@given(answers(), st.booleans())
def test_what_is_written_is_read(case, learned):
    records, identity = case
    table = count_table(identity.vocabulary, np.tile(records.ids, (3, 1)), records.draws)
    table = table if learned and len(records) else plain_table(identity.vocabulary)
    assert_within(through(records, identity, table), records, identity.logprob_error)


@pytest.mark.parametrize("vocabulary", [257, 201_088, 1 << 20])
def test_ids_of_any_size_pass(vocabulary):
    """Frequent and unheard-of, at the edges of pages and at the end of the vocabulary."""
    identity = replace(IDENTITY, vocabulary=vocabulary, topk=4, tail_draws=1)
    some = [0, 1, 255, 256, 16384 - 1, 16384, 65535, 65536, vocabulary // 2, vocabulary - 2, vocabulary - 1]
    ids = np.array(
        [token for token in some if token < vocabulary - 2] + [vocabulary - 2, vocabulary - 1], np.int32
    )
    rows = np.stack([np.roll(ids, shift)[:4] for shift in range(len(ids))]).astype(np.int32)
    logprobs = np.tile(np.log(np.full(4, 0.15)), (len(rows), 1)).astype(np.float32)
    records = TopKRecords(
        logprobs[:, 0], rows, logprobs, np.full(len(rows), 0.4, np.float32), rows[:, :1].copy()
    )
    table = count_table(vocabulary, np.tile(rows[:7], (30, 1)), records.draws)
    assert_within(through(records, identity, table), records, identity.logprob_error)
    np.testing.assert_array_equal(unpack_table(memoryview(pack_table(table)), vocabulary).order, table.order)


def test_a_table_makes_frequent_ids_short():
    rng = np.random.default_rng(0)
    identity = replace(IDENTITY, vocabulary=50_000, topk=32)
    often = rng.permutation(50_000)[:300]
    rows = np.stack([rng.permutation(often)[:32] for _ in range(500)]).astype(np.int32)
    logprobs = np.tile(np.log(np.full(32, 0.03)), (500, 1)).astype(np.float32)
    given = TopKRecords(logprobs[:, 0], rows, logprobs, np.full(500, 0.04, np.float32), rows[:, :2].copy())
    known = encode(given, count_table(50_000, rows, given.draws), 0.01, False)
    unknown = encode(given, plain_table(50_000), 0.01, False)
    assert len(known) < 0.65 * len(unknown)
    assert identity.topk == 32


def test_a_position_with_fewer_ids_than_a_fixed_k_is_refused():
    given = records(np.random.default_rng(0), 5, ADAPTIVE)
    with pytest.raises(StoreError, match="fewer ids than K, which is fixed; give the store a mass"):
        encode(given, plain_table(100), 0.01, adaptive=False)


@pytest.mark.parametrize("identity", [IDENTITY, ADAPTIVE], ids=["fixed", "adaptive"])
def test_hostile_bytes_are_refused_or_read_but_nothing_else(identity):
    """With the checksums out of the way: no exception but ours, and no allocation beyond the block's size."""
    rng = np.random.default_rng(1)
    given = records(rng, 40, identity)
    table = count_table(100, given.ids, given.draws)
    adaptive = identity.mass is not None
    payload = encode(given, table, 0.01, adaptive)
    refused = 0
    for trial in range(400):
        content = bytearray(payload)
        for _ in range(int(rng.integers(1, 4))):
            content[rng.integers(len(content))] = rng.integers(256)
        if trial % 4 == 0:
            content = content[: rng.integers(len(content))]
        try:
            decode(memoryview(bytes(content)), 40, 8, 2, table, 0.01, adaptive)
        except StoreError:
            refused += 1
    assert refused > 200
    with pytest.raises(StoreError, match="more than a block has"):
        decode(memoryview(payload), 1 << 30, 8, 2, table, 0.01, adaptive)


def test_hostile_tables_are_refused_or_read():
    rng = np.random.default_rng(2)
    given = records(rng, 200)
    payload = pack_table(count_table(100, given.ids, given.draws))
    for _ in range(400):
        content = bytearray(payload)
        content[rng.integers(len(content))] = rng.integers(256)
        try:
            table = unpack_table(memoryview(bytes(content)), 100)
        except StoreError:
            continue
        assert sorted(table.order.tolist()) == list(range(100))
