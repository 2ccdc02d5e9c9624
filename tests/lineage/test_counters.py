"""Which version comes next: a name is never given twice, and naming one looks at no other."""

import shutil
from datetime import UTC, datetime

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage import counters
from vpmoe_assets.lineage.ledger import DIRECTORY


def name(version: str) -> str:
    return version.split("-")[0]


def test_a_removed_version_gives_neither_its_name_nor_its_sequence_to_the_next(store):
    first, second = publish(store, "a"), publish(store, "a")
    shutil.rmtree(store.directory(second))
    shutil.rmtree(store.root / ".work")
    third = publish(store, "a")
    assert third.sequence == 3
    assert len({name(record.version) for record in (first, second, third)}) == 3
    shutil.rmtree(store.root / "smoke")
    assert publish(store, "a").sequence == 4


def test_a_version_that_was_copied_in_from_elsewhere_counts(store):
    record = publish(store, "a")
    ahead = record.model_copy(update={"sequence": 7, "version": f"99990101.3-{record.digest[:8]}"})
    shutil.copytree(store.directory(record), store.directory(ahead))
    write(store, ahead)
    after = publish(store, "a")
    assert (after.sequence, name(after.version)) == (8, "99990101.4")
    assert store.latest("smoke", "a").version == after.version


def write(store, record) -> None:
    from vpmoe_assets.lineage.record import RECORD_NAME, Record, record_bytes

    path = store.directory(record) / RECORD_NAME
    path.chmod(0o644)
    path.write_bytes(record_bytes(Record.model_validate(record.to_dict())))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"not json"])
def test_without_its_counter_a_store_counts_what_is_there(store, content):
    for _ in range(3):
        publish(store, "a")
    path = store.root / DIRECTORY / "counters" / "smoke" / "a.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    record = publish(store, "a")
    assert (record.sequence, name(record.version).split(".")[1]) == (4, "4")


def test_a_clock_that_was_set_back_makes_no_earlier_name(store, monkeypatch):
    class Clock(datetime):
        day = 20

        @classmethod
        def now(cls, zone):
            return datetime(2026, 3, cls.day, tzinfo=zone)

    monkeypatch.setattr(counters, "datetime", Clock)
    versions = [publish(store, "a").version]
    Clock.day = 19
    versions.append(publish(store, "a").version)
    Clock.day = 21
    versions.append(publish(store, "a").version)
    assert [name(version) for version in versions] == ["20260320.1", "20260320.2", "20260321.1"]
    assert store.find("smoke", "a", versions[1]).published_utc.startswith("2026-03-19")
    assert UTC is not None
