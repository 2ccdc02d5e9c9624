"""Scored conversations: the right ones, packed alone, each token beside what the teacher said of it."""

import shutil

import pytest
import torch

from tests.trainer.train.stores import answers, identity, write_store
from tests.trainer.train.train_jobs import SEQ_LEN, make_job, tiny_recipe, write_conversations
from trainer.contract.schema.base import parse
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.subset import scored_sequence
from trainer.data.indexed import SpanDocuments
from trainer.data.kd import PackedDataset
from trainer.data.sampler import collate
from trainer.data.scored import ScoredDataset, ScoredDocuments
from trainer.errors import DataError
from trainer.train.inputs import open_data


@pytest.fixture(scope="module")
def store(conversations, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("teacher_topk"), conversations)


def scored(conversations, store, split="train", fraction=0.5):
    return ScoredDocuments(SpanDocuments(conversations, split), TopKStore(store), split, fraction)


def dataset(conversations, store, tmp_path, split="train"):
    return ScoredDataset(
        scored(conversations, store, split), seq_len=SEQ_LEN, block=32, seed=7, cache_dir=tmp_path
    )


def test_the_subset_is_the_rule_for_training_and_everything_for_validation(conversations, store):
    whole = SpanDocuments(conversations, "train")
    by_rule = [n for n in range(len(whole)) if scored_sequence(whole[n].tokens, 0.5)]
    assert scored(conversations, store).numbers.tolist() == by_rule
    assert 0 < len(by_rule) < len(whole)
    assert len(scored(conversations, store, "valid")) == len(SpanDocuments(conversations, "valid"))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_token_is_beside_what_the_teacher_said_of_it(conversations, store, tmp_path, split):
    """Against a loop over tokens that asks the teacher again, within the error that the store states."""
    packed, whole = dataset(conversations, store, tmp_path, split), SpanDocuments(conversations, split)
    seen = []
    for index in range(packed.num_samples(0)):
        sample = packed.sample(0, index)
        at = 0
        for number in packed.documents_of(0, index).tolist():
            document = int(packed.documents.numbers[number])
            seen.append(document)
            tokens, mask, span = whole[document]
            said = answers(tokens[1:][mask[:-1] > 0], identity())
            row = 0
            for t in range(len(tokens)):
                if not mask[t]:
                    assert sample["span_id"][at + t] == 0
                    assert sample["teacher_ids"][at + t].tolist() == [-1] * 4
                    continue
                assert sample["span_id"][at + t] == span[t] + 3
                assert sample["labels"][at + t] == tokens[t + 1]
                assert sample["teacher_ids"][at + t].tolist() == said.ids[row].tolist()
                assert sample["teacher_draws"][at + t].tolist() == said.draws[row].tolist()
                assert abs(sample["teacher_logprobs"][at + t].numpy() - said.logprobs[row]).max() <= 0.0101
                assert abs(float(sample["teacher_label_logprob"][at + t]) - said.label_logprob[row]) <= 0.0101
                assert abs(float(sample["teacher_tail"][at + t]) - said.tail_mass[row]) < 0.02
                row += 1
            assert row == len(said)
            at += len(tokens)
        padding = sample["doc_id"] < 0
        assert torch.equal(
            sample["teacher_logprobs"][padding], torch.full((int(padding.sum()), 4), -torch.inf)
        )
    assert sorted(seen) == packed.documents.numbers.tolist(), "each once"


def test_scored_and_plain_conversations_can_share_a_micro_batch(conversations, store, tmp_path):
    plain = PackedDataset(
        SpanDocuments(conversations, "train"), seq_len=SEQ_LEN, block=32, seed=7, cache_dir=tmp_path
    ).sample(0, 0)
    with_scores = dataset(conversations, store, tmp_path).sample(0, 0)
    both = collate([plain, with_scores])
    for name, values in with_scores.items():
        assert torch.equal(both[name][1], values)
    assert both["teacher_ids"].shape == (2, SEQ_LEN, 4)
    assert (both["teacher_ids"][0] == -1).all()
    assert set(both["span_id"][0].tolist()) == {0, 1, 2}
    assert set(both["span_id"][1].tolist()) == {0, 4, 5}
    assert collate([plain]).keys() == plain.keys()


def test_another_store_is_another_order(conversations, store, tmp_path):
    other = write_store(tmp_path / "other", conversations, identity(tail_draws=3))
    one, two = dataset(conversations, store, tmp_path), dataset(conversations, other, tmp_path)
    assert one.documents.lengths_sha256 == two.documents.lengths_sha256
    assert one.pack_index_sha256(0) != two.pack_index_sha256(0)


def opened(base, data, store, *, inputs=(), **changes):
    terms = {"fraction": 0.7, "subset_fraction": 0.5, "topk": 4, "tail_draws": 2} | changes
    recipe = parse(TrainRecipe, tiny_recipe() | {"scored": terms})
    job = make_job(base, data, inputs={"teacher_topk": store, **dict(inputs)})
    return open_data(job, recipe, cache_dir=base / "cache")


def test_a_run_opens_both_kinds_of_conversations_of_one_data_set(conversations, store, tmp_path):
    data = opened(tmp_path, conversations, store)
    assert list(data.parts) == ["scored", "conversations"]
    assert data.store["span_means"].keys() == {"reasoning", "final"}
    assert data.parts["scored"].train.num_samples(0) < data.parts["conversations"].train.num_samples(0)
    assert data.parts["scored"].valid.num_samples(0) == data.parts["conversations"].valid.num_samples(0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"dataset_digest": "e" * 64}, "dataset_digest is 'eee"),
        ({"tokenizer_sha256": "e" * 64}, "tokenizer_sha256 is 'eee"),
        ({"topk": 3}, "topk is 3, expected 4; score"),
        ({"tail_draws": 0}, "tail_draws is 0, expected 2"),
        ({"subset_fraction": 0.4}, "subset_fraction is 0.4, expected 0.5"),
        ({"teacher": {"kind": "checkpoint", "digest": "e" * 64}}, "teacher is {'digest': 'eee"),
    ],
)
def test_a_store_of_other_terms_is_refused(conversations, tmp_path, terms, message):
    store = write_store(tmp_path / "store", conversations, identity(**terms))
    with pytest.raises(StoreError, match=message):
        opened(tmp_path, conversations, store, inputs={"teacher": store})


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_missing_record_is_refused_with_its_shard_and_sequence(conversations, store, tmp_path, split):
    sequence = int(scored(conversations, store, split).numbers[0])
    store = write_store(tmp_path / "store", conversations, leave_out=(split, 0, sequence))
    with pytest.raises(DataError, match=rf"sequence {sequence} of shard 0 of '{split}' has no records"):
        opened(tmp_path, conversations, store)


def test_records_of_other_conversations_are_refused(conversations, store, tmp_path):
    other = write_conversations(tmp_path / "data", seed=1)
    with pytest.raises(DataError, match=r"shard 0 of 'train' has (no )?records|score the data set again"):
        opened(tmp_path, other, store)
    longer = write_conversations(tmp_path / "longer", rows=10)
    with pytest.raises(DataError, match="which has 5; it was made for another data set"):
        opened(tmp_path, longer, store)


def test_another_number_of_records_than_of_tokens_is_refused_when_they_are_read(
    conversations, store, tmp_path
):
    documents = scored(conversations, store)
    with pytest.raises(
        DataError, match=r"has \d+ records of sequence \d+ of shard \d of 'train', which has 1 "
    ):
        documents.records(0, 1)


def test_a_flipped_bit_is_refused_when_it_is_read(conversations, store, tmp_path):
    damaged = shutil.copytree(store, tmp_path / "damaged")
    path = damaged / "train" / "shard_00.topk"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StoreError, match=r"shard_00\.topk: block 0 is damaged"):
        read_all(dataset(conversations, damaged, tmp_path))


def read_all(packed):
    return [packed.sample(0, index) for index in range(packed.num_samples(0))]


def test_a_missing_input_is_named(conversations, store, tmp_path):
    terms = {"fraction": 0.7, "subset_fraction": 0.5, "topk": 4, "tail_draws": 2}
    recipe = parse(TrainRecipe, tiny_recipe() | {"scored": terms})
    with pytest.raises(
        ValueError, match=r"teacher_topk is missing; a training job with recipe\.scored needs it"
    ):
        open_data(make_job(tmp_path, conversations), recipe, cache_dir=tmp_path)
