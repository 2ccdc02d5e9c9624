"""Plain-text windows, rebuilt from the shuffled concatenation."""

import re

import numpy as np
import pytest
import torch

from trainer.data.text import TextDataset, TextDocuments
from trainer.errors import DataError

EOD = 199_999
S = 16


def concatenation(documents, seed, epoch):
    """The epoch's stream, with Philox words drawn one at a time; and the order of its windows."""
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = [i for _, i in sorted((int(bits.random_raw()), i) for i in range(len(documents)))]
    stream = np.concatenate([documents[i] for i in order])
    windows = (len(stream) - 1) // S
    return stream, [i for _, i in sorted((int(bits.random_raw()), i) for i in range(windows))]


def test_window_equals_a_loop_over_the_stream(text_payload):
    root, documents = text_payload(np.random.default_rng(1).integers(1, 40, size=50).tolist())
    dataset = TextDataset(TextDocuments(root, "train"), seq_len=S, seed=9)
    for epoch in (0, 1):
        stream, windows = concatenation(documents, 9, epoch)
        assert dataset.num_samples(epoch) == len(windows)
        for index, window in enumerate(windows):
            piece = stream[window * S : window * S + S + 1].tolist()
            position, document, rows = 0, 0, []
            for t in range(S):
                at_end = piece[t] == EOD
                rows.append(
                    (piece[t], piece[t + 1], 0 if at_end else 1, 0 if at_end else 3, position, document)
                )
                position, document = (0, document + 1) if at_end else (position + 1, document)
            sample = dataset.sample(epoch, index)
            names = ("tokens", "labels", "loss_mask", "span_id", "position_ids", "doc_id")
            for name, column in zip(names, zip(*rows, strict=True), strict=True):
                assert sample[name].tolist() == list(column), name
                assert sample[name].dtype == (torch.float32 if name == "loss_mask" else torch.int64)


def test_every_token_but_the_first_is_a_label_once(text_payload):
    root, documents = text_payload([5, 9, 30, 21, 1, 15])  # 81 = 5 * 16 + 1 tokens: nothing is left over
    dataset = TextDataset(TextDocuments(root, "train"), seq_len=S, seed=0)
    labels = np.concatenate([dataset.sample(0, index)["labels"].numpy() for index in range(5)])
    stream, _ = concatenation(documents, 0, 0)
    assert dataset.num_samples(0) == 5
    assert sorted(labels.tolist()) == sorted(stream[1:].tolist())


def test_last_partial_window_is_left_out(text_payload):
    root, _ = text_payload([5, 9, 30, 21, 1, 14])
    assert TextDataset(TextDocuments(root, "train"), seq_len=S, seed=0).num_samples(0) == 4


def test_epochs_differ_and_repeat(text_payload):
    root, _ = text_payload([7] * 40)
    one, two = (TextDataset(TextDocuments(root, "train"), seq_len=S, seed=3) for _ in range(2))
    digests = [one.pack_index_sha256(epoch) for epoch in range(4)]
    assert len(set(digests)) == 4
    assert [two.pack_index_sha256(epoch) for epoch in reversed(range(4))] == digests[::-1]
    assert one.fill_ratio(0) == 1.0


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_each_window_is_read_once(text_payload, seed):
    root, documents = text_payload([7, 3, 40, 11, 20])
    dataset = TextDataset(TextDocuments(root, "train"), seq_len=S, seed=seed)
    stream, _ = concatenation(documents, seed, 0)
    rows = {tuple(dataset.sample(0, index)["tokens"].tolist()) for index in range(dataset.num_samples(0))}
    assert rows == {tuple(stream[start : start + S].tolist()) for start in range(0, 5 * S, S)}


@pytest.mark.parametrize("index", [-1, 5])
def test_no_such_sample(text_payload, index):
    root, _ = text_payload([81])
    with pytest.raises(IndexError, match=f"sample {index}.*0 to 4"):
        TextDataset(TextDocuments(root, "train"), seq_len=S, seed=0).sample(0, index)


def test_too_little_text_is_refused(text_payload):
    root, _ = text_payload([S])
    with pytest.raises(DataError, match="16 tokens of text do not fill one window of 17"):
        TextDataset(TextDocuments(root, "train"), seq_len=S, seed=0)


def test_missing_split_manifest_and_damage_are_refused(text_payload):
    root, _ = text_payload([9, 30])
    with pytest.raises(DataError, match="'valid' split is empty"):
        TextDocuments(root, "valid")
    path = root / "train" / "healing_text_v1_tokens.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(DataError, match=re.escape(str(path))):
        TextDocuments(root, "train")
    path.write_bytes(data[:-4] + np.int32(7).tobytes())
    with pytest.raises(DataError, match="document 1 ends with token 7"):
        TextDocuments(root, "train")
    path.write_bytes(np.int32(EOD).tobytes() + data[4:])
    with pytest.raises(DataError, match=r"document 0 of .* EOD 199999 at positions \[0, 8\]"):
        TextDocuments(root, "train")[0]
    (root / "manifest.json").unlink()
    with pytest.raises(DataError, match="no manifest"):
        TextDocuments(root, "train")
