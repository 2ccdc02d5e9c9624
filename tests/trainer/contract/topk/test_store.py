import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.trainer.contract.topk.distributions import IDENTITY, assert_within, records
from trainer.contract.topk import writer
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.shard_file import (
    BLOCK,
    END,
    INDEX,
    TABLE,
    Frame,
    pack_frame,
    read_frame,
    whole_frames,
)
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.writer import TopKShardWriter


def make(root, identity=IDENTITY):
    """A store of one shard a split; returns what was written into it."""
    rng = np.random.default_rng(0)
    written, entries = {}, {}
    for split, step in (("train", 3), ("valid", 1)):
        (root / split).mkdir(parents=True)
        shard = TopKShardWriter(root / split / "shard_00.topk", identity, split=split, shard=0)
        for sequence in range(0, 30, step):
            written[split, sequence] = records(rng, int(rng.integers(0, 40)), identity)
            shard.add(sequence, written[split, sequence])
        entries[split] = [shard.close()]
    write_manifest(root, identity, entries, {"reasoning": -1.5, "final": -0.5})
    return written


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of several blocks a shard, and what was written into it."""
    root = tmp_path_factory.mktemp("store") / "payload"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BLOCK_TOKENS", 64)
        return root, make(root)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the store to be damaged."""
    shutil.copytree(made[0], tmp_path / "payload")
    return tmp_path / "payload"


def frames(root, split="train") -> list[Frame]:
    """Frames of a shard."""
    content = (root / split / "shard_00.topk").read_bytes()
    begin = content.index(b"}") + 1
    return [frame for frame, _ in whole_frames(content, begin, "shard")]


def test_every_sequence_is_read_back_by_its_address(made):
    root, written = made
    store = TopKStore(root)
    assert store.shards("train") == store.shards("valid") == [0]
    assert store.sequences("train", 0).tolist() == list(range(0, 30, 3))
    for split, sequence in reversed(written):
        assert_within(store.read(split, 0, sequence), written[split, sequence], IDENTITY.logprob_error)
    assert store.manifest["span_means"] == {"reasoning": -1.5, "final": -0.5}
    assert store.manifest["splits"]["valid"]["tokens"] == sum(
        len(some) for (split, _), some in written.items() if split == "valid"
    )
    store.verify()


def test_the_same_answers_give_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_TOKENS", 64)
    make(tmp_path / "again")
    for file in sorted(path for path in made[0].rglob("*") if path.is_file()):
        assert (tmp_path / "again" / file.relative_to(made[0])).read_bytes() == file.read_bytes()


def test_records_that_are_not_there_are_refused(made):
    store = TopKStore(made[0])
    with pytest.raises(
        StoreError, match=r"train/shard_00.topk: block 0 has no record of sequence 1: it was not"
    ):
        store.read("train", 0, 1)
    with pytest.raises(StoreError, match=r"no shard 7 of 'train', only \[0\]; score"):
        store.read("train", 7, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_digest", "another"),
        ("tokenizer_sha256", "another"),
        ("teacher", {"kind": "artifact", "digest": "another"}),
        ("topk", "another"),
    ],
)
def test_another_store_than_expected_is_refused(made, key, value):
    TopKStore(made[0], {key: IDENTITY.document[key]})
    with pytest.raises(StoreError, match=rf"{key} is .*expected .*another.*; score the data set with"):
        TopKStore(made[0], {key: value})


def test_any_flipped_bit_is_found(copied):
    """Wherever it is, and named with its block if it is in one."""
    path = copied / "train" / "shard_00.topk"
    content, blocks = path.read_bytes(), [f for f in frames(copied) if f.tag == BLOCK]
    assert len(blocks) > 2
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(content), 100).tolist(), 0, len(content) - 1]:
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        inside = [number for number, f in enumerate(blocks) if f.offset <= at < f.end]
        name = f"train/shard_00.topk: block {inside[0]} is" if inside else "train/shard_00.topk"
        with pytest.raises(StoreError, match=rf"{name}.*(score|delete)"):
            TopKStore(copied).verify()


def test_a_damaged_block_spoils_no_other(copied, made):
    path = copied / "train" / "shard_00.topk"
    blocks = [f for f in frames(copied) if f.tag == BLOCK]
    content = bytearray(path.read_bytes())
    content[blocks[1].end - 1] ^= 1
    path.write_bytes(content)
    store = TopKStore(copied)
    assert_within(store.read("train", 0, 0), made[1]["train", 0], 0.01)
    with pytest.raises(
        StoreError, match=r"block 1 is damaged: its checksum is not that of its bytes; delete it and"
    ):
        store.read("train", 0, blocks[1].first)


def test_a_cut_off_shard_is_refused(copied):
    path = copied / "valid" / "shard_00.topk"
    size = path.stat().st_size
    for cut in (0, 10, size // 2, size - 1):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(
            StoreError, match=rf"valid/shard_00.topk is cut off: {cut} bytes, expected {size}"
        ):
            TopKStore(copied)
        path.write_bytes((path.read_bytes() + bytes(size))[:size])
        with pytest.raises(StoreError, match=r"valid/shard_00.topk.*(score|delete)"):
            TopKStore(copied).verify()
    path.unlink()
    with pytest.raises(StoreError, match=r"valid/shard_00.topk is missing"):
        TopKStore(copied)


def test_a_shard_of_another_teacher_is_refused(copied, tmp_path):
    """Though it has the right name and a manifest that fits its bytes."""
    other = replace(IDENTITY, teacher={**IDENTITY.teacher, "digest": "u"})
    make(tmp_path / "other", other)
    theirs = tmp_path / "other" / "train" / "shard_00.topk"
    shutil.copy(theirs, copied / "train" / "shard_00.topk")
    manifest = json.loads((copied / "store.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] = theirs.stat().st_size
    (copied / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"belongs to another store: binding"):
        TopKStore(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema="vpmoe.topk/9"), r"schema 'vpmoe.topk/9', expected 'vpmoe.topk/1'"),
        (lambda m: m.update(topk=4), "its binding is not the digest"),
        (lambda m: m.update(topk=1 << 40), "topk = 1099511627776: expected a number from 1 to 100"),
        (lambda m: m.pop("vocabulary"), "damaged .*vocabulary"),
        (lambda m: m.pop("splits"), "damaged .*splits"),
        (lambda m: m["splits"]["train"]["shards"].append({"shard": 3}), "damaged .*bytes"),
        (lambda m: m["splits"]["train"]["shards"][0].update(shard=10**300), "damaged .*shard is 1000"),
        (lambda m: m["splits"]["train"]["shards"][0].update(shard=-1), "damaged .*shard is -1"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(copied, change, message):
    manifest = json.loads((copied / "store.json").read_text())
    change(manifest)
    (copied / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=rf"store.json.*{message}"):
        TopKStore(copied)


def test_a_directory_without_a_manifest_is_no_store(tmp_path):
    with pytest.raises(StoreError, match=r"store.json is missing: .* is no finished top-K store"):
        TopKStore(tmp_path)


def test_files_with_right_checksums_and_wrong_contents_are_refused_or_read(copied):
    """What a hostile hand can make: every frame whole, its payload another."""
    path = copied / "train" / "shard_00.topk"
    content = path.read_bytes()
    rng = np.random.default_rng(5)
    manifest = json.loads((copied / "store.json").read_text())
    parts = frames(copied)
    for _ in range(120):
        victim = parts[int(rng.integers(len(parts)))]
        _, payload = read_frame(content, victim.offset, "frame")
        payload = bytearray(payload)
        payload[int(rng.integers(len(payload)))] = int(rng.integers(256))
        frame = pack_frame(victim.tag, bytes(payload), victim.first, victim.sequences, victim.tokens)
        path.write_bytes(content[: victim.offset] + frame + content[victim.end :])
        manifest["splits"]["train"]["shards"][0]["bytes"] = path.stat().st_size
        (copied / "store.json").write_text(json.dumps(manifest))
        if path.read_bytes() != content:
            with pytest.raises(StoreError):  # the sha256 at the latest
                TopKStore(copied).verify()
        try:
            store = TopKStore(copied)
            for sequence in store.sequences("train", 0).tolist():
                store.read("train", 0, sequence)
        except StoreError:
            continue
    assert {frame.tag for frame in parts} == {BLOCK, TABLE, INDEX}
    assert content.endswith(END.pack(parts[-1].offset, content[-8:]))
