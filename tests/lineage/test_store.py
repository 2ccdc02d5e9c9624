import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.lineage.fabricate import FILES, damage, draft, fill, publish, recipe
from vpmoe_assets.lineage import hashcache
from vpmoe_assets.lineage.digest import file_sha256, merkle_root, scan_tree
from vpmoe_assets.lineage.errors import (
    ArtifactBlocked,
    ArtifactDamaged,
    ArtifactMissing,
    BusyError,
    PublishError,
    RecordError,
    UnsafePathError,
)
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork is meant

FAILED = {"name": "aligned", "passed": False, "blocking": True, "description": "3 arrays differ"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts")


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# Publishing.


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


def test_latest_is_the_highest_sequence_whatever_the_version_is_called(store, monkeypatch):
    first = publish(store, "synth")
    second = publish(store, "synth")
    assert (first.sequence, second.sequence) == (1, 2)
    assert store.latest("smoke", "synth") == second
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


def test_a_full_disk_while_publishing_leaves_nothing_and_loses_nothing(store, monkeypatch):
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work)
        before = files_below(work.path)
        real = os.fsync
        calls = iter(range(100))

        def full(descriptor):
            if next(calls) == 8:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.publish(work, draft(payload))
        monkeypatch.undo()
        assert files_below(work.path) == before
        assert store.latest("smoke", "a") is None
        assert store.publish(work, draft(payload)).digest


# Reuse and refusal.


def test_an_intact_artifact_of_the_same_recipe_is_reused(store):
    record = publish(store, "a", recipe_keys={"lr": 1})
    publish(store, "a", recipe_keys={"lr": 2})
    assert store.reusable("smoke", "a", record.fingerprint) == record
    assert store.reusable("smoke", "b", record.fingerprint) is None
    assert store.reusable("full", "a", record.fingerprint) is None


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
    assert store.latest("smoke", "a") == record
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
    assert store.reusable("smoke", "a", newest.fingerprint) is None
    healed = publish(store, "a")
    assert healed.sequence == 3
    assert store.require("smoke", "a") == healed


def test_a_record_copied_to_another_place_is_not_believed(store):
    record = publish(store, "a")
    shutil.copytree(store.directory(record), store.root / "smoke" / "b" / record.version)
    with pytest.raises(ArtifactDamaged, match="record of smoke/a"):
        store.require("smoke", "b")


def test_the_digest_cache_answers_for_untouched_files_and_notices_every_write(tmp_path, monkeypatch):
    monkeypatch.setattr(hashcache, "SMALLEST", 0)
    monkeypatch.setattr(hashcache, "_SETTLED_S", 0.0)
    hashed = []

    def count(path):
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr(hashcache, "file_sha256", count)
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"0123456789")
    time.sleep(0.02)
    assert cache(file) == cache(file) == file_sha256(file)
    assert len(hashed) == 1
    before = file.stat()
    file.write_bytes(b"0123456780")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert cache(file) == file_sha256(file)
    (tmp_path / "c.sqlite").write_bytes(b"this is not a database" * 100)
    assert cache(file) == file_sha256(file)


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(hashcache, "SMALLEST", 0)
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"x")
    cache(file)
    assert cache._known(file, hashcache._identity(file)) is None


# Crashes.


def killed_at(step: int, store: Store, fingerprint: str, payload: dict) -> int:
    """Publish in a child that kills itself with SIGKILL before its ``step``-th change of the file system."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def trap(function):
            def call(*arguments, **keywords):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod"):
            setattr(os, name, trap(getattr(os, name)))
        try:
            with store.work_area("smoke", "a", fingerprint) as work:
                if not (work.payload / "data.bin").exists():
                    fill(work, manifest={"rows": 1})
                    (work.path / "metrics.jsonl").write_text("{}\n")
                    (work.run / "log.txt").write_text("log")
                store.publish(work, draft(payload))
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return status


def test_killed_at_any_step_nothing_half_published_is_visible_and_the_next_attempt_loses_nothing(tmp_path):
    fingerprint, payload = recipe("a")
    visible = []
    for step in range(200):
        store = Store(tmp_path / str(step))
        status = killed_at(step, store, fingerprint, payload)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen = store.latest("smoke", "a")
        visible.append(seen is not None)
        if seen is not None:
            assert verify_record(store, seen) == []
            assert store.require("smoke", "a") == seen
        with store.work_area("smoke", "a", fingerprint) as work:
            if (again := store.reusable("smoke", "a", fingerprint)) is None:
                if not (work.payload / "data.bin").exists():
                    # Killed before it was made; from then on the payload is never lost.
                    assert not list(store.root.rglob("data.bin"))
                fill(work, manifest={"rows": 1})
                again = store.publish(work, draft(payload))
        assert again.sequence == 1
        assert verify_record(store, again) == []
        assert store.versions("smoke", "a") == [again.version]
        assert files_below(store.payload(again)) == FILES
    else:
        pytest.fail("publishing takes more than 200 steps")
    assert step > 25
    assert visible == sorted(visible), "an artifact that was visible may not vanish"
    assert any(visible)


def test_killed_again_while_recovering_still_loses_nothing(tmp_path):
    fingerprint, payload = recipe("a")
    store = Store(tmp_path)
    for step in range(200):
        status = killed_at(step, store, fingerprint, payload)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        if store.latest("smoke", "a") is not None:
            break
    record = store.require("smoke", "a")
    assert files_below(store.payload(record)) == FILES
    assert sorted(files_below(store.directory(record) / "run")) == ["log.txt", "metrics.jsonl"]
    assert verify_record(store, record) == []


PUBLISHER = """
import sys
from pathlib import Path
from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    print(publish(store, "a", files={f"f{i}": bytes(1000) for i in range(20)}).sequence, flush=True)
"""


def test_kill_9_of_a_publisher_at_any_moment_leaves_a_whole_store(tmp_path):
    store = Store(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    printed = 0
    for delay in (0.0, 0.037, 0.11):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.kill()
        printed = max([printed, *map(int, process.communicate()[0].split("\n")[:-1])])
    records = list(store.records())
    assert len(records) >= printed
    assert [r.sequence for r in records] == list(range(1, len(records) + 1))
    for record in records:
        assert verify_record(store, record) == []
    assert list(store.damaged()) == []
    assert publish(store, "a").sequence == len(records) + 1


# Concurrency.


def publish_several(root: Path, worker: int, results) -> None:
    store = Store(root)
    results.put([publish(store, "a", recipe_keys={"worker": worker, "n": n}).version for n in range(6)])


def test_two_processes_that_publish_at_once_get_distinct_sequence_numbers(tmp_path):
    context = get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=publish_several, args=(tmp_path, n, results)) for n in range(2)]
    for worker in workers:
        worker.start()
    versions = [version for _ in workers for version in results.get(timeout=60)]
    for worker in workers:
        worker.join(timeout=60)
    records = list(Store(tmp_path).records())
    assert [r.sequence for r in records] == list(range(1, 13))
    assert sorted(versions) == sorted(r.version for r in records)
    assert len({v.split("-")[0] for v in versions}) == 12


def hold_work_area(root: Path, fingerprint: str, held, release) -> None:
    with Store(root).work_area("smoke", "a", fingerprint):
        held.set()
        release.wait(30)


def test_the_second_process_with_the_same_recipe_waits_or_says_who_holds_it(tmp_path):
    context = get_context("fork")
    held, release = context.Event(), context.Event()
    fingerprint, _ = recipe("a")
    process = context.Process(target=hold_work_area, args=(tmp_path, fingerprint, held, release))
    process.start()
    assert held.wait(30)
    store = Store(tmp_path)
    with (
        pytest.raises(BusyError, match=f"held by pid {process.pid} on"),
        store.work_area("smoke", "a", fingerprint, wait_s=0.2),
    ):
        pass
    release.set()
    with store.work_area("smoke", "a", fingerprint, wait_s=30):
        process.join(timeout=30)
        assert process.exitcode == 0


def test_the_lock_dies_with_its_holder_and_the_work_does_not(tmp_path):
    context = get_context("fork")
    held, release = context.Event(), context.Event()
    fingerprint, _ = recipe("a")
    store = Store(tmp_path)
    with store.work_area("smoke", "a", fingerprint) as work:
        (work.path / "checkpoints").mkdir()
        (work.path / "checkpoints" / "iter_0000005").write_text("weights")
    process = context.Process(target=hold_work_area, args=(tmp_path, fingerprint, held, release))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join(timeout=30)
    with store.work_area("smoke", "a", fingerprint, wait_s=5) as work:
        assert (work.path / "checkpoints" / "iter_0000005").read_text() == "weights"


def test_clearing_the_work_area_starts_over(store):
    fingerprint, _ = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work)
        (work.path / "log.txt").write_text("x")
        work.clear()
        assert sorted(files_below(work.path)) == [".fingerprint"]
        assert work.payload.is_dir()
    assert not work.path.exists()


def test_two_recipes_with_the_same_first_eight_digits_do_not_mix(store):
    with store.work_area("smoke", "a", "0" * 64) as work:
        fill(work)
    with (
        pytest.raises(RecordError, match="remove that directory"),
        store.work_area("smoke", "a", "0" * 63 + "1"),
    ):
        pass


def test_directories_without_a_record_do_not_exist_for_anyone(store):
    record = publish(store, "a")
    orphan = store.root / "smoke" / "a" / "99990101.7-deadbeef"
    (orphan / "payload").mkdir(parents=True)
    (orphan / "payload" / "x").write_bytes(b"x")
    assert store.latest("smoke", "a") == record
    assert store.versions("smoke", "a") == [record.version]
    assert stat.S_ISDIR(orphan.stat().st_mode)
    assert publish(store, "a").sequence == 3
