import numpy as np
import pytest

from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.writer import TopKShardWriter

IDENTITY = StoreIdentity(
    teacher={"kind": "artifact", "digest": "t", "reasoning_mode": "high"},
    tokenizer_sha256="o200k",
    dataset_digest="kd",
    subset_fraction=0.5,
    vocabulary=100,
    topk=8,
    tail_draws=2,
)


def records(rng: np.random.Generator, n: int, identity: StoreIdentity = IDENTITY) -> TopKRecords:
    """Records of random distributions, as a teacher of this identity gives them."""
    logits = 2 * rng.normal(size=(n, identity.vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, tail = order[:, : identity.topk], order[:, identity.topk :]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    draws = tail[:, rng.integers(0, tail.shape[1], identity.tail_draws)]
    return TopKRecords(
        logprobs[:, 3].astype(np.float32),
        ids.astype(np.int32),
        kept.astype(np.float32),
        (1 - np.exp(kept).sum(axis=1)).astype(np.float32),
        draws.astype(np.int32),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of one shard a split, and what was written into it."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    written, entries = {}, {}
    for split, step in (("train", 3), ("valid", 1)):
        (root / split).mkdir()
        writer = TopKShardWriter(root / split / "shard_00.topk", IDENTITY, split=split, shard=0)
        for sequence in range(0, 60, step):
            written[split, sequence] = records(rng, int(rng.integers(0, 900)))
            writer.add(sequence, written[split, sequence])
        entries[split] = [writer.close()]
    write_manifest(root, IDENTITY, entries, {"reasoning": -1.5})
    return root, written


def test_every_sequence_is_read_back_by_its_address(written):
    root, expected = written
    store = TopKStore(root)
    assert store.sequences("train", 0).tolist() == list(range(0, 60, 3))
    for split, sequence in reversed(list(expected)):
        found, given = store.read(split, 0, sequence), expected[split, sequence]
        np.testing.assert_array_equal(found.ids, given.ids)
        np.testing.assert_array_equal(found.draws, given.draws)
        np.testing.assert_allclose(found.logprobs, given.logprobs, atol=IDENTITY.logprob_error)
        np.testing.assert_allclose(found.label_logprob, given.label_logprob, atol=IDENTITY.logprob_error)
        assert np.all(np.exp(found.logprobs.astype(float)).sum(axis=1) + found.tail_mass <= 1 + 1e-6)
    store.verify()


def test_a_sequence_without_records_is_refused(written):
    store = TopKStore(written[0])
    with pytest.raises(StoreError, match=r"block 0 has no record of sequence 1: it was not scored"):
        store.read("train", 0, 1)
    with pytest.raises(StoreError, match=r"no shard 7 of 'train'"):
        store.read("train", 7, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_digest", "another"),
        ("tokenizer_sha256", "another"),
        ("teacher", {"kind": "artifact", "digest": "another"}),
    ],
)
def test_another_store_than_expected_is_refused(written, key, value):
    TopKStore(written[0], {key: IDENTITY.document[key]})
    with pytest.raises(StoreError, match=rf"{key} is .*expected .*another"):
        TopKStore(written[0], {key: value})
