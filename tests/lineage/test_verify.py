import json
import shutil

import pytest

from tests.lineage.fabricate import damage, publish
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def chain(store):
    """synth -> synth_harmony -> synth_kd_v1, which also names synth itself."""
    synth = publish(store, "synth")
    harmony = publish(store, "synth_harmony", (synth,), manifest={"rows": 1}, run={"log.txt": b"log"})
    return synth, harmony, publish(store, "synth_kd_v1", (harmony, synth))


def found(problems):
    return [(p.kind, p.artifact.split("/")[1], p.path) for p in problems]


def test_an_intact_ancestry_has_no_problems(store, chain):
    assert verify_record(store, chain[-1]) == []


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, 150, 299])
def test_one_flipped_bit_anywhere_in_the_ancestry_is_found_and_named(store, chain, generation, offset):
    record = chain[generation]
    damage(store.payload(record) / "data.bin", offset)
    assert found(verify_record(store, chain[-1])) == [("content", record.asset, "payload/data.bin")]
    assert verify_record(store, chain[-1], deep=False) == []


def test_every_kind_of_damage_is_told_apart(store, chain):
    payload = store.payload(chain[-1])
    (payload / "data.bin").unlink()
    (payload / "extra").write_bytes(b"")
    odd = payload / "sub" / "odd name\n€.txt"
    odd.chmod(0o644)
    odd.write_bytes(b"x")
    assert found(verify_record(store, chain[-1], deep=False)) == [
        ("missing", "synth_kd_v1", "payload/data.bin"),
        ("extra", "synth_kd_v1", "payload/extra"),
        ("size", "synth_kd_v1", "payload/sub/odd name\n€.txt"),
    ]


@pytest.mark.parametrize("path", ["run/log.txt", "manifest.json"])
def test_run_files_and_the_manifest_are_verified_too(store, chain, path):
    damage(store.directory(chain[1]) / path)
    assert found(verify_record(store, chain[-1])) == [("content", "synth_harmony", path)]


def test_an_added_manifest_is_noticed(store, chain):
    (store.directory(chain[0]) / "manifest.json").write_text("{}")
    assert found(verify_record(store, chain[0])) == [("extra", "synth", "manifest.json")]


def test_an_ancestor_that_was_replaced_by_another_record_is_noticed(store, chain):
    synth = chain[0]
    path = store.directory(synth) / RECORD_NAME
    fields = json.loads(path.read_text())
    del fields["record_digest"]
    fields["seed"] = 99
    from vpmoe_assets.lineage.record import Record, record_bytes

    path.chmod(0o644)
    path.write_bytes(record_bytes(Record.model_validate(fields)))
    assert ("ancestor", "synth_harmony", RECORD_NAME) in found(verify_record(store, chain[-1]))
    assert found(verify_record(store, synth)) == [("record", "synth", RECORD_NAME)]


def test_a_missing_or_unreadable_ancestor_is_noticed(store, chain):
    path = store.directory(chain[0]) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{}")
    assert [p[0] for p in found(verify_record(store, chain[1]))] == ["ancestor"]
    shutil.rmtree(store.directory(chain[0]))
    problems = verify_record(store, chain[-1])
    assert {p[:2] for p in found(problems)} == {("ancestor", "synth_harmony"), ("ancestor", "synth_kd_v1")}
    assert "no longer in the store" in problems[0].message


def test_shared_ancestors_are_read_once(store, chain, monkeypatch):
    from vpmoe_assets.lineage import verify

    read = []
    real = verify.payload_problems
    monkeypatch.setattr(verify, "payload_problems", lambda d, r, h: read.append(r.asset) or real(d, r, h))
    seen: set[str] = set()
    for record in chain:
        assert verify_record(store, record, seen=seen) == []
    assert sorted(read) == ["synth", "synth_harmony", "synth_kd_v1"]
