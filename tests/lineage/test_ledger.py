"""The ledger: every record that was ever published, wherever its version is now."""

import shutil

import pytest

from tests.lineage.fabricate import as_of_schema_1, damage, publish
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.ledger import Entry, Ledger
from vpmoe_assets.lineage.record import RECORD_NAME


def entry(record) -> Entry:
    return Entry(record.record_digest, record.experiment, record.asset, record.version)


def index_of(store, record):
    return store.ledger.root / "by-fingerprint" / record.fingerprint[:2] / record.fingerprint


def test_a_record_outlives_its_version(store):
    records = [publish(store, "a"), publish(store, "b", manifest={"rows": 1})]
    shutil.rmtree(store.root / "smoke")
    assert sorted(store.ledger.digests()) == sorted(record.record_digest for record in records)
    for record in records:
        assert store.ledger.get(record.record_digest) == record
        assert store.ledger.of_fingerprint(record.fingerprint) == [entry(record)]
    assert store.ledger.get("0" * 64) is None


def test_a_copy_that_was_altered_or_exchanged_is_not_believed(store):
    one, two = publish(store, "a"), publish(store, "a")
    damage(store.ledger.path(one.record_digest), 70)
    with pytest.raises(RecordError):
        store.ledger.get(one.record_digest)
    shutil.copyfile(store.ledger.path(two.record_digest), store.ledger.path(one.record_digest))
    with pytest.raises(RecordError, match="is the record of digest"):
        store.ledger.get(one.record_digest)


@pytest.mark.parametrize("torn", [b"0123", b"\n" + b"a" * 64 + b" smoke", b"\n\xff\xfe 1 2 3", b"\n\n\n"])
def test_a_line_that_a_kill_cut_short_hides_no_other(store, torn):
    first = publish(store, "a", recipe_keys={})
    with index_of(store, first).open("ab") as file:
        file.write(torn)
    second = publish(store, "a", recipe_keys={})
    assert store.ledger.of_fingerprint(first.fingerprint) == [entry(first), entry(second)]


def test_a_line_of_a_record_that_never_became_visible_is_passed_over(store):
    record = publish(store, "a")
    with index_of(store, record).open("a") as file:
        file.write(f"\n{'0' * 64} full a 20260101.1-00000000\n")
    assert store.reusable("other", "a", record.fingerprint) == record


def test_a_store_from_before_there_was_a_ledger_gets_one_from_its_records(store):
    records = [publish(store, "a"), publish(store, "a"), publish(store, "b", manifest={"rows": 1})]
    shutil.rmtree(store.root / ".records")
    assert store.rebuild_ledger() == 3
    assert store.rebuild_ledger() == 0
    rebuilt = Ledger(store.root)
    for record in records:
        assert rebuilt.get(record.record_digest) == record
        assert rebuilt.of_fingerprint(record.fingerprint) == [entry(record)]
    assert rebuilt.manifest(records[2].manifest.sha256).exists()
    (store.directory(records[0]) / RECORD_NAME).unlink()
    assert store.rebuild_ledger() == 0


def test_records_of_schema_1_go_into_the_ledger_as_they_are(store):
    record = as_of_schema_1(store, publish(store, "a"))
    assert store.rebuild_ledger() == 1
    written = (store.directory(record) / RECORD_NAME).read_bytes()
    assert store.ledger.path(record.record_digest).read_bytes() == written
    assert store.ledger.get(record.record_digest) == record
