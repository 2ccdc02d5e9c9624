"""What was removed or damaged and comes out the same again is restored under its original record."""

import shutil
import time

import pytest

from tests.lineage.fabricate import FILES, damage, draft, fill, publish, recipe
from vpmoe_assets.lineage import filememory, restoring
from vpmoe_assets.lineage.errors import ArtifactDamaged
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, record_bytes
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.verify import verify_record

FIRST = {"log.txt": b"first", "metrics.jsonl": b"{}\n"}
SECOND = {"log.txt": b"second", "metrics.jsonl": b"{}\n"}


def make(store, run=FIRST, files=FILES, asset="a", sha="1", **fields):
    """Make the same artifact; log and commit are those of the repetition."""
    return publish(
        store,
        asset,
        recipe_keys={"k": 1},
        files=files,
        run=run,
        manifest={"rows": 2, "git_sha": sha},
        **fields,
    )


def restored(store, record):
    return [each.body for each in store.statements.about(record) if each.kind == "restored"]


def take_away(store, record, what):
    directory = store.directory(record)
    if what == "directory":
        shutil.rmtree(directory)
    elif what == "asset":
        shutil.rmtree(directory.parent)
    elif what == "record":
        (directory / RECORD_NAME).unlink()
    elif what == "extra":
        (directory / "payload" / "stray").write_bytes(b"")
    else:
        damage(directory / what, 5)


KINDS = ["directory", "asset", "record", "extra", RECORD_NAME, MANIFEST_NAME, "payload/data.bin"]


@pytest.mark.parametrize("what", KINDS)
def test_whatever_is_lost_comes_back_under_its_own_record_and_descendants_verify(store, what):
    parent = make(store)
    child = publish(store, "child", (parent,))
    take_away(store, parent, what)
    assert verify_record(store, child) != []
    again = make(store, SECOND, sha="2", dagster_run_id="run-2")
    assert again == parent
    assert store.versions("smoke", "a") == [parent.version]
    assert (store.directory(parent) / RECORD_NAME).read_bytes() == record_bytes(parent)
    assert b'"1"' in (store.directory(parent) / MANIFEST_NAME).read_bytes()
    assert store.require("smoke", "a") == parent
    lost = ["log.txt"] if what in ("directory", "asset") else []
    repeated = ["metrics.jsonl"] if what in ("directory", "asset") else []
    assert restored(store, parent) == [{"run": "run-2", "lost": lost, "repeated": repeated}]
    assert [problem.path for problem in verify_record(store, child)] == [f"run/{name}" for name in lost]


@pytest.mark.parametrize("what", ["record", RECORD_NAME])
def test_a_lost_record_of_an_intact_payload_needs_no_repetition(store, what):
    record = make(store)
    take_away(store, record, what)
    found = store.reusable("smoke", "a", record.fingerprint)
    assert found == record
    with store.work_area("smoke", "a", record.fingerprint) as work:
        assert store.renew(work, found, inputs=[], blocking_checks=[], run="run-2") == record
    assert verify_record(store, record) == []
    assert restored(store, record) == [{"run": "run-2", "lost": [], "repeated": []}]


def test_an_intact_version_is_left_alone_and_another_content_is_another_version(store):
    first = make(store)
    second = make(store)
    assert (second.sequence, restored(store, first)) == (2, [])
    for record in (first, second):
        shutil.rmtree(store.directory(record))
    other = make(store, files={"data.bin": b"other"})
    assert other.sequence == 3
    assert store.versions("smoke", "a") == [other.version]


def test_a_manifest_that_says_something_else_is_another_artifact(store):
    first = make(store)
    shutil.rmtree(store.directory(first))
    second = publish(store, "a", recipe_keys={"k": 1}, manifest={"rows": 3}, run=SECOND)
    assert second.digest == first.digest
    assert second.sequence == 2


def test_all_versions_of_the_content_come_back_sharing_their_bytes(store):
    first = make(store)
    publish(store, "a", recipe_keys={"k": 2})
    with store.work_area("smoke", "a", first.fingerprint) as work:
        third = store.renew(work, first, inputs=[], blocking_checks=[], run=None)
    assert third.sequence == 3
    shutil.rmtree(store.root / "smoke" / "a")
    assert make(store, SECOND) == third
    assert store.versions("smoke", "a") == [first.version, third.version]
    payloads = [store.payload(record) / "data.bin" for record in (first, third)]
    assert payloads[0].samefile(payloads[1])
    assert [len(restored(store, record)) for record in (first, third)] == [1, 1]


def test_what_is_restored_behind_a_newer_recipe_is_published_as_the_latest_too(store):
    first = make(store)
    publish(store, "a", recipe_keys={"k": 2})
    shutil.rmtree(store.directory(first))
    third = make(store, SECOND)
    assert (third.sequence, third.digest) == (3, first.digest)
    assert store.find("smoke", "a") == third
    assert store.find("smoke", "a", first.version) == first
    assert store.require("smoke", "a", first.version) == first


def test_a_lost_older_version_of_an_intact_one_is_restored_with_its_reuse(store):
    first = make(store)
    publish(store, "a", recipe_keys={"k": 2})
    with store.work_area("smoke", "a", first.fingerprint) as work:
        third = store.renew(work, first, inputs=[], blocking_checks=[], run=None)
    shutil.rmtree(store.directory(first))
    with store.work_area("smoke", "a", first.fingerprint) as work:
        found = store.reusable("smoke", "a", first.fingerprint)
        assert store.renew(work, found, inputs=[], blocking_checks=[], run="run-4") == third
    assert verify_record(store, first) == []


def test_what_was_collected_on_purpose_is_not_restored_by_reuse_but_by_being_made_again(store):
    first = make(store)
    publish(store, "a", recipe_keys={"k": 2})
    with store.work_area("smoke", "a", first.fingerprint) as work:
        third = store.renew(work, first, inputs=[], blocking_checks=[], run=None)
    store.statements.append(Statement.about(first, "collected"))
    shutil.rmtree(store.directory(first))
    with store.work_area("smoke", "a", first.fingerprint) as work:
        store.renew(work, third, inputs=[], blocking_checks=[], run=None)
    assert store.versions("smoke", "a")[0] != first.version
    shutil.rmtree(store.directory(third))
    assert make(store, SECOND) == third
    assert store.find("smoke", "a", first.version) == first


def test_a_rewritten_record_is_put_right_and_a_name_that_was_given_twice_is_respected(store):
    record = make(store)
    path = store.directory(record) / RECORD_NAME
    forged = record.model_copy(update={"metrics": {"loss": 0.0}})
    del forged.__dict__["record_digest"]
    path.chmod(0o644)
    path.write_bytes(record_bytes(forged))
    damage(store.payload(record) / "data.bin")
    assert make(store, SECOND) == record
    assert path.read_bytes() == record_bytes(record)
    path.chmod(0o644)
    path.write_bytes(record_bytes(forged))
    store.ledger.put(forged, store.directory(record))
    damage(store.payload(record) / "data.bin")
    assert make(store, SECOND) == forged
    assert path.read_bytes() == record_bytes(forged), "each of two records of a name keeps what it has"


def test_without_its_manifest_a_version_cannot_be_restored_and_is_published_anew(store):
    first = make(store)
    shutil.rmtree(store.directory(first))
    shutil.rmtree(store.ledger.root / "manifests")
    second = make(store, SECOND, sha="2")
    assert (second.sequence, second.digest) == (2, first.digest)
    assert store.require("smoke", "a") == second


def test_a_damaged_artifact_is_refused_with_the_advice_to_make_it_again_and_that_helps(store):
    record = make(store)
    damage(store.payload(record) / "data.bin")
    with pytest.raises(ArtifactDamaged, match="Materialise it again") as refused:
        store.require("smoke", "a")
    assert "emove" not in str(refused.value)
    assert store.reusable("smoke", "a", record.fingerprint) is None
    fingerprint, payload = recipe("a", k=1)
    assert fingerprint == record.fingerprint
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work, manifest={"rows": 2})
        assert store.publish(work, draft(payload)) == record
    assert store.require("smoke", "a") == record


def test_restored_files_are_known_to_the_digest_cache_as_what_they_are(store, monkeypatch):
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    record = make(store)
    damage(store.payload(record) / "data.bin")
    time.sleep(0.02)
    with pytest.raises(ArtifactDamaged):
        store.require("smoke", "a")
    make(store, SECOND)
    assert store.require("smoke", "a") == record
    damage(store.payload(record) / "data.bin")
    with pytest.raises(ArtifactDamaged):
        store.require("smoke", "a")


def test_an_older_version_that_cannot_be_restored_does_not_make_reuse_publish_again(store, monkeypatch):
    first = make(store)
    publish(store, "a", recipe_keys={"k": 2})
    with store.work_area("smoke", "a", first.fingerprint) as work:
        third = store.renew(work, first, inputs=[], blocking_checks=[], run=None)
    shutil.rmtree(store.directory(first))
    monkeypatch.setattr(restoring.Restorer, "prepare", lambda *_: None)
    for _ in range(2):
        with store.work_area("smoke", "a", first.fingerprint) as work:
            assert store.renew(work, third, inputs=[], blocking_checks=[], run=None) == third
    assert store.versions("smoke", "a")[-1] == third.version
