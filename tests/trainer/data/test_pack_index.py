"""The stored pack index: found again, never trusted, never half there."""

import hashlib
import json
import logging
import threading

import numpy as np
import pytest

import trainer.data.pack_index as module
from trainer.data.pack_index import PackKey, load_or_build
from trainer.data.packing import pack

LENGTHS = (np.arange(300) * 17 % 91 + 1).astype(np.int32)


def key(**changes):
    digest = hashlib.sha256(LENGTHS.tobytes()).hexdigest()
    return PackKey(
        **({"lengths_sha256": digest, "seq_len": 128, "block": 64, "seed": 5, "epoch": 0} | changes)
    )


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_pairs_and_digest_are_those_of_the_packing(tmp_path):
    index = load_or_build(tmp_path, key(), LENGTHS)
    documents, sizes = pack(LENGTHS, seq_len=128, block=64, seed=5, epoch=0)
    (entry,) = entries(tmp_path)
    stored = np.load(entry / "pack_index.npy", allow_pickle=False)
    assert stored.dtype == np.dtype("<i8")
    assert stored.tolist() == list(
        map(list, zip(np.repeat(np.arange(len(sizes)), sizes), documents, strict=True))
    )
    assert index.sha256 == hashlib.sha256(stored.tobytes()).hexdigest()
    assert json.loads((entry / "pack_index.json").read_text())["sha256"] == index.sha256
    assert index.num_samples == len(sizes)
    assert index.fill_ratio == LENGTHS.sum() / (128 * len(sizes))
    parts = np.split(documents, np.cumsum(sizes)[:-1])
    assert all(np.array_equal(index.documents(sample), part) for sample, part in enumerate(parts))


@pytest.mark.parametrize("sample", [-1, 10_000])
def test_sample_outside_the_epoch(tmp_path, sample):
    with pytest.raises(IndexError, match=f"sample {sample}"):
        load_or_build(tmp_path, key(), LENGTHS).documents(sample)


def test_second_call_does_not_pack_again(tmp_path, monkeypatch):
    first = load_or_build(tmp_path, key(), LENGTHS).sha256
    monkeypatch.setattr(module, "pack", lambda *_, **__: pytest.fail("packed again"))
    assert load_or_build(tmp_path, key(), LENGTHS).sha256 == first


@pytest.mark.parametrize(
    "change", [{"seq_len": 129}, {"block": 63}, {"seed": 6}, {"epoch": 1}, {"lengths_sha256": "0" * 64}]
)
def test_every_part_of_the_key_has_an_entry_of_its_own(tmp_path, change):
    load_or_build(tmp_path, key(), LENGTHS)
    load_or_build(tmp_path, key(**change), LENGTHS)
    assert len(entries(tmp_path)) == 2


def flip_bit(entry):
    path = entry / "pack_index.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(entry):
    path = entry / "pack_index.npy"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_inside(entry):
    np.save(entry / "pack_index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        flip_bit,
        truncate,
        pickle_inside,
        lambda entry: (entry / "pack_index.json").unlink(),
        lambda entry: (entry / "pack_index.json").write_text("{"),
        lambda entry: (entry / "pack_index.npy").unlink(),
    ],
    ids=["bit flipped", "truncated", "pickle", "no metadata", "metadata cut", "no array"],
)
def test_damaged_entry_is_reported_and_made_again(tmp_path, caplog, damage):
    first = load_or_build(tmp_path, key(), LENGTHS).sha256
    (entry,) = entries(tmp_path)
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert load_or_build(tmp_path, key(), LENGTHS).sha256 == first
    assert str(entry) in caplog.text
    caplog.clear()
    assert load_or_build(tmp_path, key(), LENGTHS).sha256 == first
    assert not caplog.text


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        load_or_build(tmp_path, key(), LENGTHS)
    assert entries(tmp_path) == []
    monkeypatch.undo()
    assert load_or_build(tmp_path, key(), LENGTHS).num_samples > 0


def test_many_callers_pack_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "pack", lambda *a, **k: calls.append(1) or pack(*a, **k))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(load_or_build(tmp_path, key(), LENGTHS).sha256))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 6
    assert len(set(found)) == 1
