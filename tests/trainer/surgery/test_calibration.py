import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.surgery.calibration_cases import EOD, write_text
from trainer.data.rng import permutation, stream
from trainer.errors import DataError
from trainer.surgery.calibration import Calibration, load_calibration


def test_slice_is_the_beginning_of_the_seeds_document_order(tmp_path):
    documents = write_text(tmp_path, [5, 9, 3, 12, 7])
    order = permutation(stream(7, 0), 5)
    expected = np.concatenate([documents[place] for place in order])[:20]
    slice_ = load_calibration(tmp_path, tokens=20, seq_len=8, seed=7)
    np.testing.assert_array_equal(slice_.ids, expected)
    assert slice_.sha256 == hashlib.sha256(expected.astype("<i4").tobytes()).hexdigest()
    assert slice_.describe()["tokens"] == 20


def test_seed_and_length_are_part_of_the_identity(tmp_path):
    write_text(tmp_path, [5, 9, 3, 12, 7])
    digests = {
        load_calibration(tmp_path, tokens=tokens, seq_len=8, seed=seed).sha256
        for tokens, seed in ((20, 1), (20, 2), (21, 1))
    }
    assert len(digests) == 3


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seq_len=st.integers(1, 7),
    batch_tokens=st.integers(1, 30),
    take=st.integers(1, 60),
)
def test_batches_hold_every_token_once_with_its_document_and_label(lengths, seq_len, batch_tokens, take):
    ids = np.concatenate([np.append(np.arange(1, length), EOD) for length in lengths]).astype(np.int32)
    slice_ = Calibration(ids, seq_len, len(lengths), EOD, 0)
    batches = slice_.batches(tokens=take, batch_tokens=batch_tokens)
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    np.testing.assert_array_equal(tokens, ids[:take])
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    place_of = np.concatenate([np.arange(length) for length in lengths])
    at = 0
    for batch in batches:
        assert batch.tokens.shape[1] <= seq_len
        for row, positions in zip(batch.doc_id, batch.position_ids, strict=True):
            where = np.arange(at, at + len(row))
            documents = document_of[where]
            np.testing.assert_array_equal(row, documents - documents[0])
            begun = np.where(documents == documents[0], where - at, place_of[where])
            np.testing.assert_array_equal(positions, begun)
            at += len(row)
    for place, label in enumerate(labels):
        known = place + 1 < len(ids) and ids[place] != EOD
        assert label == (ids[place + 1] if known else -1)


def test_text_that_is_too_short_is_refused_with_the_numbers(tmp_path):
    write_text(tmp_path, [5, 9])
    with pytest.raises(DataError, match=r"calibration_tokens = 15.*14 tokens"):
        load_calibration(tmp_path, tokens=15, seq_len=8, seed=0)


def test_missing_or_damaged_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="manifest"):
        load_calibration(tmp_path, tokens=4, seq_len=4, seed=0)
    write_text(tmp_path, [5, 9])
    data = Path(tmp_path) / "train" / "healing_text_v1_tokens.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"healing_text_v1_tokens\.bin"):
        load_calibration(tmp_path, tokens=4, seq_len=4, seed=0)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": "other"}))
    with pytest.raises(DataError, match="other"):
        load_calibration(tmp_path, tokens=4, seq_len=4, seed=0)
