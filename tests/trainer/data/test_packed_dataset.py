"""Samples of packed conversations, rebuilt token by token from the documents."""

import numpy as np
import pytest
import torch

from trainer.data.indexed import SpanDocuments
from trainer.data.kd import PackedDataset
from trainer.data.packing import pack
from trainer.errors import DataError

EOD = 199_999
S = 64


def open_packed(payload, tmp_path, split="train", **changes):
    arguments = {"seq_len": S, "block": 8, "seed": 1234, "cache_dir": tmp_path / "cache"} | changes
    return PackedDataset(SpanDocuments(payload.root, split), **arguments)


@pytest.fixture
def payload(kd_payload):
    lengths = np.random.default_rng(0).integers(6, S + 1, size=40).tolist()
    return kd_payload(train=[lengths[:25], lengths[25:]])


def test_sample_equals_a_loop_over_its_documents(payload, tmp_path):
    dataset = open_packed(payload, tmp_path)
    documents = [each for shard in payload.documents["train"].values() for each in shard]
    seen = []
    for index in range(dataset.num_samples(0)):
        row = []  # (token, mask, span, position, document in row)
        for number, document in enumerate(dataset.documents_of(0, index).tolist()):
            seen.append(document)
            for position, (token, mask, span) in enumerate(zip(*documents[document], strict=True)):
                row.append((token, mask, span, position, number))
        assert len(row) <= S
        row += [(EOD, 0, 0, 0, -1)] * (S - len(row))
        tokens, mask, span, position, doc_id = (
            torch.tensor(np.array(column)) for column in zip(*row, strict=True)
        )

        sample = dataset.sample(0, index)
        assert set(sample) == {"tokens", "labels", "loss_mask", "span_id", "position_ids", "doc_id"}
        assert {name: value.dtype for name, value in sample.items() if value.dtype != torch.int64} == {
            "loss_mask": torch.float32
        }
        assert torch.equal(sample["tokens"], tokens.long())
        assert torch.equal(sample["labels"], torch.cat((tokens[1:].long(), torch.tensor([EOD]))))
        assert torch.equal(sample["loss_mask"], mask.float())
        assert torch.equal(sample["span_id"], span.long())
        assert torch.equal(sample["position_ids"], position.long())
        assert torch.equal(sample["doc_id"], doc_id.long())
    assert sorted(seen) == list(range(40))  # an epoch is every conversation once


def test_no_supervised_label_crosses_a_document(payload, tmp_path):
    dataset = open_packed(payload, tmp_path)
    supervised = 0
    for index in range(dataset.num_samples(0)):
        sample = dataset.sample(0, index)
        places = torch.nonzero(sample["loss_mask"]).squeeze(1)
        supervised += len(places)
        assert (places < S - 1).all()
        assert torch.equal(sample["doc_id"][places], sample["doc_id"][places + 1])
        assert (sample["doc_id"][places] >= 0).all()
        assert (sample["labels"][places] != EOD).all()
        assert torch.equal(sample["loss_mask"] > 0, sample["span_id"] > 0)
    stored = sum(int(mask.sum()) for shard in payload.documents["train"].values() for _, mask, _ in shard)
    assert supervised == stored


def test_order_is_that_of_the_packing(payload, tmp_path):
    dataset = open_packed(payload, tmp_path)
    documents, sizes = pack(dataset.documents.lengths, seq_len=S, block=8, seed=1234, epoch=2)
    assert dataset.num_samples(2) == len(sizes)
    found = np.concatenate([dataset.documents_of(2, index) for index in range(len(sizes))])
    assert np.array_equal(found, documents)
    assert dataset.fill_ratio(2) == dataset.documents.lengths.sum() / (S * len(sizes))


def test_epochs_differ_and_a_second_reader_agrees(payload, tmp_path):
    first, second = (
        open_packed(payload, tmp_path),
        open_packed(payload, tmp_path, cache_dir=tmp_path / "other"),
    )
    digests = [first.pack_index_sha256(epoch) for epoch in range(4)]
    assert len(set(digests)) == 4
    assert [second.pack_index_sha256(epoch) for epoch in reversed(range(4))] == digests[::-1]
    for name, value in first.sample(3, 1).items():
        assert torch.equal(value, second.sample(3, 1)[name])


def test_samples_are_the_callers_own(payload, tmp_path):
    dataset = open_packed(payload, tmp_path)
    before = dataset.sample(0, 0)["tokens"].clone()
    dataset.sample(0, 0)["tokens"].zero_()
    assert torch.equal(dataset.sample(0, 0)["tokens"], before)


def test_document_longer_than_the_sequence_is_refused_by_name(payload, tmp_path):
    dataset = open_packed(payload, tmp_path, seq_len=5)
    with pytest.raises(DataError, match=r"document 0 of .*shard_00_tokens.bin has \d+ tokens.*1 to 5"):
        dataset.sample(0, 0)


def test_full_sample_has_no_padding(kd_payload, tmp_path):
    dataset = open_packed(kd_payload(train=[[S]]), tmp_path)
    sample = dataset.sample(0, 0)
    assert sample["doc_id"].eq(0).all()
    assert sample["tokens"][-1] == EOD
    assert sample["labels"][-1] == EOD
    assert sample["loss_mask"][-1] == 0
