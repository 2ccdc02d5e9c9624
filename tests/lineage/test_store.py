"""What is in a store, what may be built on, and what is refused."""

import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

from tests.lineage.fabricate import FILES, damage, publish
from vpmoe_assets.lineage import filememory, headcache
from vpmoe_assets.lineage.digest import FileEntry, merkle_root
from vpmoe_assets.lineage.errors import ArtifactBlocked, ArtifactDamaged, ArtifactMissing, RecordError
from vpmoe_assets.lineage.record import RECORD_NAME, Record, record_bytes
from vpmoe_assets.lineage.store import Store

LOOKUP = """
import resource, sys, time
from pathlib import Path
from vpmoe_assets.lineage.store import Store
peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
store = Store(Path(sys.argv[1]))
assert all(store.latest("smoke", f"a{n}").sequence == 7 for n in range(40))
seconds = time.perf_counter() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024)
"""

FAILED = {"name": "aligned", "passed": False, "blocking": True, "description": "3 arrays differ"}


def test_latest_is_the_highest_sequence_whatever_the_version_is_called(store, monkeypatch):
    first = publish(store, "synth")
    second = publish(store, "synth")
    assert (first.sequence, second.sequence) == (1, 2)
    assert store.find("smoke", "synth") == second
    assert store.versions("smoke", "synth") == [first.version, second.version]
    shutil.rmtree(store.directory(first))
    assert publish(store, "synth").sequence == 3


def test_experiments_do_not_see_each_other(store):
    publish(store, "synth", experiment="smoke")
    assert store.latest("full", "synth") is None
    assert [r.experiment for r in store.records()] == ["smoke"]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "-x", "a b", "ä"])
def test_names_that_would_leave_the_store_are_refused(store, name):
    for call in (store.latest, store.require):
        with pytest.raises((RecordError, ArtifactDamaged)):
            call("smoke", name)
        with pytest.raises((RecordError, ArtifactDamaged)):
            call(name, "synth")


def test_an_intact_artifact_of_the_same_recipe_is_reused(store):
    record = publish(store, "a", recipe_keys={"lr": 1})
    publish(store, "a", recipe_keys={"lr": 2})
    assert store.reusable("smoke", "a", record.fingerprint) == record
    assert store.reusable("smoke", "b", record.fingerprint) is None


@pytest.mark.parametrize("name", ["payload/data.bin", "manifest.json"])
def test_damage_stops_reuse_and_consumers_and_names_the_file(store, name):
    record = publish(store, "a", manifest={"rows": 12})
    assert store.require("smoke", "a") == record
    damage(store.directory(record) / name, offset=5)
    assert store.reusable("smoke", "a", record.fingerprint) is None
    with pytest.raises(ArtifactDamaged, match=name):
        store.require("smoke", "a")


def test_truncated_missing_and_added_files_are_damage_too(store):
    record = publish(store, "a")
    payload = store.payload(record)
    (payload / "data.bin").chmod(0o644)
    os.truncate(payload / "data.bin", 10)
    with pytest.raises(ArtifactDamaged, match=r"data\.bin: 10 bytes, expected 300"):
        store.require("smoke", "a")
    (payload / "data.bin").unlink()
    with pytest.raises(ArtifactDamaged, match=r"data\.bin: missing"):
        store.require("smoke", "a")
    (payload / "data.bin").write_bytes(FILES["data.bin"])
    (payload / "new").write_bytes(b"")
    with pytest.raises(ArtifactDamaged, match="payload/new: not in the record"):
        store.require("smoke", "a")
    (payload / "new").unlink()
    assert store.require("smoke", "a") == record


def test_a_file_replaced_by_a_link_out_of_the_tree_is_damage_even_with_equal_contents(store, tmp_path):
    record = publish(store, "a")
    (tmp_path / "copy").write_bytes(FILES["data.bin"])
    (store.payload(record) / "data.bin").unlink()
    (store.payload(record) / "data.bin").symlink_to(tmp_path / "copy")
    with pytest.raises(ArtifactDamaged, match="leaves"):
        store.require("smoke", "a")


def test_a_failed_blocking_check_stops_consumers_and_nothing_is_made_again_for_it(store):
    record = publish(store, "a", checks=[FAILED])
    assert store.find("smoke", "a") == record
    assert store.reusable("smoke", "a", record.fingerprint) == record
    with pytest.raises(ArtifactBlocked, match="aligned: 3 arrays differ"):
        store.require("smoke", "a")
    publish(store, "b", checks=[FAILED | {"blocking": False, "severity": "WARN"}])
    assert store.findings(store.require("smoke", "b"))[0].outcome == "failed"


def test_what_was_never_published_is_missing(store):
    with pytest.raises(ArtifactMissing, match="materialise it first"):
        store.require("smoke", "a")
    publish(store, "a")
    with pytest.raises(ArtifactMissing, match="versions: 20"):
        store.require("smoke", "a", "20000101.1-00000000")


def test_an_unreadable_newest_record_is_never_passed_over_and_a_new_publication_heals(store):
    publish(store, "a")
    newest = publish(store, "a")
    path = store.directory(newest) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    for call in (store.latest, store.require):
        with pytest.raises((RecordError, ArtifactDamaged), match=str(path)):
            call("smoke", "a")
    healed = publish(store, "a")
    assert healed.sequence == 3
    assert store.require("smoke", "a") == healed


def test_the_latest_of_forty_artifacts_of_a_thousand_files_is_found_in_50_ms_by_a_fresh_process(tmp_path):
    """A record of a thousand files takes 30 ms to read."""
    store = Store(tmp_path)
    one = publish(store, "a0", recipe_keys={})
    files = [FileEntry(f"{n:04}.bin", n, f"{n:064x}") for n in range(1000)]
    for n in range(40):
        fields = {
            "asset": f"a{n}",
            "files": files,
            "digest": merkle_root(files),
            "version": "20260101.1-00000000",
        }
        record = Record.model_validate(one.to_dict() | fields | {"sequence": 7})
        directory = store.directory(record)
        directory.mkdir(parents=True)
        (directory / RECORD_NAME).write_bytes(record_bytes(record))
    time.sleep(2.1)  # until the files count as settled
    started = time.perf_counter()
    list(store.heads())
    assert time.perf_counter() - started > 0.2, "unknown records are read"
    answer = subprocess.run(
        [sys.executable, "-c", LOOKUP, str(tmp_path)], capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, answer.stdout.split())
    assert seconds < 0.05
    assert megabytes < 8


def test_a_record_is_known_from_its_publication_on(store, monkeypatch):
    monkeypatch.setattr(filememory, "_SEALED_SETTLED_NS", 0)
    record = publish(store, "a")
    monkeypatch.setattr(headcache, "read_record", lambda path: pytest.fail(f"{path} was read"))
    assert Store(store.root).latest("smoke", "a").record_digest == record.record_digest


def test_a_record_copied_to_another_place_is_not_believed(store):
    record = publish(store, "a")
    shutil.copytree(store.directory(record), store.root / "smoke" / "b" / record.version)
    with pytest.raises(ArtifactDamaged, match="record of smoke/a"):
        store.require("smoke", "b")


def test_directories_without_a_record_do_not_exist_for_anyone(store):
    record = publish(store, "a")
    orphan = store.root / "smoke" / "a" / "99990101.7-deadbeef"
    (orphan / "payload").mkdir(parents=True)
    (orphan / "payload" / "x").write_bytes(b"x")
    assert store.find("smoke", "a") == record
    assert store.versions("smoke", "a") == [record.version]
    assert stat.S_ISDIR(orphan.stat().st_mode)
    assert publish(store, "a").sequence == 3
