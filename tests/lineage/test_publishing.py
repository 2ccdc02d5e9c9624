"""All of an artifact is published, or nothing; what is published stays as it is."""

import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.lineage.fabricate import FILES, draft, files_below, fill, publish, recipe
from vpmoe_assets.lineage.digest import merkle_root, scan_tree
from vpmoe_assets.lineage.errors import PublishError, UnsafePathError
from vpmoe_assets.lineage.record import RECORD_NAME, record_bytes
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record


def test_layout_and_version_of_a_published_artifact(store):
    record = publish(
        store,
        "synth",
        manifest={"rows": 7, "git_sha": "x"},
        run={"metrics.jsonl": b"{}\n", "log.txt": b"hi", "heartbeat": b"", "STATUS": b"done"},
    )
    directory = store.root / "smoke" / "synth" / record.version
    assert sorted(os.listdir(directory)) == [RECORD_NAME, "manifest.json", "payload", "run"]
    assert files_below(directory / "payload") == FILES
    assert sorted(files_below(directory / "run")) == ["STATUS", "log.txt", "metrics.jsonl"]
    date, rest = record.version.split(".")
    assert len(date) == 8
    assert date.isdigit()
    assert rest == f"1-{record.digest[:8]}"
    assert record.digest == merkle_root(scan_tree(directory / "payload"))
    assert [entry.path for entry in record.run_files] == ["STATUS", "log.txt", "metrics.jsonl"]


def test_the_work_area_is_gone_afterwards_and_only_locks_remain(store):
    publish(store, "synth")
    left = [p for p in (store.root / ".work" / "smoke").rglob("*") if p.is_file() and ".locks" not in p.parts]
    assert left == []


def test_run_manifest_and_times_do_not_enter_the_content_digest(store):
    one = publish(store, "a", manifest={"t": 1}, run={"log.txt": b"1"})
    two = publish(store, "a", manifest={"t": 2}, run={"log.txt": b"2"})
    assert one.digest == two.digest
    assert one.record_digest != two.record_digest


def test_published_files_are_read_only_and_a_version_can_still_be_removed(store):
    record = publish(store, "synth", run={"log.txt": b""}, manifest={})
    for path in store.directory(record).rglob("*"):
        if path.is_file():
            assert not path.stat().st_mode & 0o222, path
    subprocess.run(["rm", "-r", store.directory(record)], check=True, stdin=subprocess.DEVNULL)
    assert store.latest("smoke", "synth") is None


def test_an_empty_payload_is_not_published(store):
    with pytest.raises(PublishError, match="empty"):
        publish(store, "synth", files={})


def test_a_draft_of_another_recipe_or_with_a_foreign_input_is_refused(store):
    parent = publish(store, "synth")
    fingerprint, payload = recipe("kd", (), x=1)
    with store.work_area("smoke", "kd", fingerprint) as work:
        fill(work)
        with pytest.raises(PublishError, match="fingerprint"):
            store.publish(work, draft(recipe("kd", (), x=2)[1]))
        with pytest.raises(PublishError, match="not among the inputs"):
            store.publish(work, draft(payload, (parent,)))
    with pytest.raises(PublishError, match="inside the work_area"):
        store.publish(work, draft(payload))


def test_the_same_name_twice_in_run_is_refused_and_nothing_moves(store):
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work)
        (work.run / "log.txt").write_text("1")
        (work.path / "log.txt").write_text("2")
        with pytest.raises(PublishError, match=r"log\.txt"):
            store.publish(work, draft(payload))
        assert (work.run / "log.txt").read_text() == "1"


def test_a_link_out_of_the_payload_stops_the_publication_and_everything_stays_in_the_work_area(
    store, tmp_path
):
    (tmp_path / "outside").write_text("x")
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work, manifest={"rows": 1})
        (work.path / "log.txt").write_text("log")
        (work.payload / "link").symlink_to(tmp_path / "outside")
        before = files_below(work.path)
        with pytest.raises(UnsafePathError, match="link"):
            store.publish(work, draft(payload))
        assert files_below(work.path) == before
        (work.path / "log.txt").write_text("still writable")
        (work.payload / "link").unlink()
        assert store.publish(work, draft(payload)).sequence == 1


def test_a_full_disk_at_any_moment_of_publishing_loses_nothing_and_a_second_try_succeeds(
    tmp_path, monkeypatch
):
    fingerprint, payload = recipe("a")
    taken_back = completed = 0
    for step in range(200):
        store = Store(tmp_path / str(step))
        with store.work_area("smoke", "a", fingerprint) as work:
            fill(work, manifest={"rows": 1})
            (work.path / "log.txt").write_text("log")
            before = files_below(work.path)
            real, calls = os.fsync, iter(range(1000))

            def full(descriptor, step=step, real=real, calls=calls):
                if next(calls) == step:
                    raise OSError(28, "No space left on device")
                real(descriptor)

            monkeypatch.setattr(os, "fsync", full)
            try:
                store.publish(work, draft(payload))
            except OSError:
                monkeypatch.undo()
            else:
                monkeypatch.undo()
                break
            if files_below(work.path) == before:
                taken_back += 1
                assert store.latest("smoke", "a") is None
                (work.path / "log.txt").open("a").close()
            else:
                completed += 1
            record = store.publish(work, draft(payload))
        assert store.require("smoke", "a") == record
        assert store.versions("smoke", "a") == [record.version]
        assert verify_record(store, record) == []
        assert list(store.ledger.digests()) == [record.record_digest]
    assert taken_back > 8
    assert completed > 3


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_published_files_have_the_mode_that_the_umask_gives_less_write(tmp_path, umask):
    """Some writers leave files that only their owner can read, or directories that only they can enter."""
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "artifacts")
        fingerprint, payload = recipe("a")
        with store.work_area("smoke", "a", fingerprint) as work:
            fill(work, manifest={"rows": 1})
            (work.path / "log.txt").write_text("said")
            save_file({"w": np.zeros(3)}, work.payload / "model.safetensors")
            assert stat.S_IMODE((work.payload / "model.safetensors").stat().st_mode) == 0o600
            (work.payload / "tool").write_bytes(b"#!/bin/sh")
            (work.payload / "tool").chmod(0o777)
            (work.payload / "sub").chmod(0o700)
            record = store.publish(work, draft(payload))
        store.ledger.put(record, store.directory(record))
    finally:
        os.umask(before)
    version = store.directory(record)
    files = [path for path in version.rglob("*") if path.is_file()]
    files += list((store.root / ".records").glob("[0-9a-f][0-9a-f]/*"))
    files += list((store.root / ".records" / "manifests").glob("*/*"))
    assert len(files) == len(FILES) + 2 + 3 + 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o444 & ~umask}
    directories = [path for path in version.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o777 & ~umask}


def test_a_file_that_can_be_written_through_another_name_gets_bytes_of_its_own(store, tmp_path):
    """A maker that links a file into the payload must not make it read-only, nor stay its writer."""
    mine = tmp_path / "mine.bin"
    mine.write_bytes(b"0123")
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        (work.payload / "data.bin").hardlink_to(mine)
        record = store.publish(work, draft(payload))
    assert mine.stat().st_mode & 0o200
    mine.write_bytes(b"other")
    assert (store.payload(record) / "data.bin").read_bytes() == b"0123"
    assert store.require("smoke", "a") == record


def test_publishing_looks_at_no_other_version(store, monkeypatch):
    for _ in range(3):
        publish(store, "a")
    looked = []
    real = Path.stat

    def spy(path, **keywords):
        if path.name == RECORD_NAME:
            looked.append(path)
        return real(path, **keywords)

    monkeypatch.setattr(Path, "stat", spy)
    record = publish(store, "a")
    monkeypatch.undo()
    assert record.sequence == 4
    assert set(looked) <= {store.directory(record) / RECORD_NAME}


def test_every_record_is_in_the_ledger_before_it_is_visible(store, monkeypatch):
    seen = []
    real = os.rename

    def spy(source, target, **keywords):
        if Path(target).parent == store.root / "smoke" / "a":
            (digest,) = store.ledger.digests()
            record = store.ledger.get(digest)
            seen.append((record, store.ledger.of_fingerprint(record.fingerprint)[0].version))
        real(source, target, **keywords)

    monkeypatch.setattr(os, "rename", spy)
    record = publish(store, "a", manifest={"rows": 1})
    assert seen == [(record, record.version)]
    assert store.ledger.path(record.record_digest).read_bytes() == record_bytes(record)
    assert store.ledger.path(record.record_digest).stat().st_nlink == 1
