import itertools

import numpy as np
import pytest

from tests.trainer.contract.topk.distributions import IDENTITY, assert_within, records
from trainer.contract.topk import learning, writer
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.shard_reader import TopKShard
from trainer.contract.topk.writer import TopKShardWriter


@pytest.fixture(scope="module")
def given():
    """Records of 24 sequences, some of them empty."""
    rng = np.random.default_rng(3)
    return {3 * number: records(rng, int(rng.integers(0, 12)) * (number % 5 > 0)) for number in range(24)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few sequences, and tables that are made again soon."""
    monkeypatch.setattr(writer, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(learning, "MADE_AT", (0, 40, 90))


def write(path, given, split="train"):
    """Write what is missing, as a job does that was started again."""
    shard = TopKShardWriter(path, IDENTITY, split=split, shard=7)
    for number, some in given.items():
        if number >= shard.next_sequence and not shard.finished:
            shard.add(number, some)
    return shard.close()


def test_a_writer_killed_at_any_byte_goes_on_and_writes_the_same_bytes(tmp_path, given):
    """What a kill leaves is a prefix of the file, or one whose last sector never came: zeros or rubbish."""
    whole = tmp_path / "whole.topk"
    entry = write(whole, given)
    content = whole.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "killed.topk"
    for cut in [0, 1, 17, *rng.integers(0, len(content), 16), len(content) - 1]:
        for rest in (b"", b"\0" * 40, rng.bytes(9)):
            path.write_bytes(content[:cut] + (rest if cut > 400 else b""))
            assert write(path, given) | {"name": "whole.topk"} == entry
            assert path.read_bytes() == content


def test_a_prefix_keeps_every_block_that_was_whole(tmp_path, given):
    path = tmp_path / "shard_07.topk"
    write(path, given)
    content = path.read_bytes()
    reached = []
    for cut in range(0, len(content), 97):
        path.write_bytes(content[:cut])
        reached.append(TopKShardWriter(path, IDENTITY, split="train", shard=7).next_sequence)
    assert reached == sorted(reached)
    assert len(set(reached)) > 5


def test_the_bytes_do_not_depend_on_how_often_it_was_stopped(tmp_path, given):
    once = write(tmp_path / "shard_07.topk", given)
    (tmp_path / "often").mkdir()
    path = tmp_path / "often" / "shard_07.topk"
    for number, some in itertools.cycle(given.items()):
        shard = TopKShardWriter(path, IDENTITY, split="train", shard=7)
        if shard.next_sequence > 60:
            break
        for later, other in given.items():
            if shard.next_sequence <= later <= number:
                shard.add(later, other)
        del shard, some  # never closed
        for last in given:
            shard = TopKShardWriter(path, IDENTITY, split="train", shard=7)
            for later, other in given.items():
                if shard.next_sequence <= later <= last:
                    shard.add(later, other)
    assert write(path, given) == once
    assert write(path, given) == once  # finished: nothing is written again


def test_what_was_written_is_read(tmp_path, given):
    entry = write(tmp_path / "shard_07.topk", given)
    shard = TopKShard(tmp_path / "shard_07.topk", IDENTITY, split="train", shard=7, entry=entry)
    assert shard.sequences.tolist() == list(given)
    for number, some in given.items():
        block = shard.block_of(number)
        sequences, found = shard.read_block(block)
        assert_within(found[shard.rows(sequences, number, block)], some, IDENTITY.logprob_error)


def test_a_shard_without_sequences_is_a_shard(tmp_path):
    entry = write(tmp_path / "shard_07.topk", {})
    shard = TopKShard(tmp_path / "shard_07.topk", IDENTITY, split="train", shard=7, entry=entry)
    assert len(shard.sequences) == 0
    assert (entry["sequences"], entry["tokens"]) == (0, 0)
    with pytest.raises(StoreError, match="is empty, so it has no record of sequence 3"):
        shard.block_of(3)


def test_sequences_come_in_order_and_once(tmp_path, given):
    shard = TopKShardWriter(tmp_path / "shard_07.topk", IDENTITY, split="train", shard=7)
    shard.add(5, given[3])
    with pytest.raises(StoreError, match="sequence 5 is already written; go on at 6"):
        shard.add(5, given[3])


def test_a_shard_of_another_place_or_store_is_not_continued(tmp_path, given):
    path = tmp_path / "shard_07.topk"
    write(path, given)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"another store: split 'train', expected 'valid'; delete it"):
        TopKShardWriter(path, IDENTITY, split="valid", shard=7)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "label_logprob",
            lambda a: np.where(np.arange(len(a)) == 2, 0.5, a),
            r"position 2 has label_logprob 0.5",
        ),
        ("label_logprob", lambda a: a * np.float32(np.nan), "log-probs are from -10000 to 0"),
        ("tail_mass", lambda a: a * 0 + 1, "mass is at most 1"),
        ("ids", lambda a: a + 100, "ids are from 0 to 99"),
        ("ids", lambda a: a * 0, "each id stands once"),
        ("logprobs", lambda a: a[:, ::-1], "they fall"),
        ("draws", lambda a: a * 0 - 1, "there is a tail, so it is drawn from"),
        ("draws", lambda a: a[:, :1], r"draws is int32 \[11, 1\], expected int32 \[11, 2\]"),
    ],
)
def test_an_impossible_answer_is_refused(tmp_path, field, change, message):
    some = records(np.random.default_rng(0), 11)
    wrong = {name: getattr(some, name) for name in ("label_logprob", "ids", "logprobs", "tail_mass", "draws")}
    wrong[field] = np.ascontiguousarray(change(wrong[field])).astype(wrong[field].dtype)
    shard = TopKShardWriter(tmp_path / "shard_07.topk", IDENTITY, split="train", shard=7)
    with pytest.raises(StoreError, match=rf"shard_07.topk: sequence 4: .*{message}"):
        shard.add(4, type(some)(**wrong))
