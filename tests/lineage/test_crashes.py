"""Killed at any moment: the whole of an artifact or nothing of it, and nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lineage.fabricate import FILES, damage, draft, files_below, fill, publish, recipe
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # fork is meant
    pytest.mark.slow,
]

CHANGES = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod", "fchmod", "link")


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Act in a child that kills itself with SIGKILL before its ``step``-th change of the file system."""
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

        for name in CHANGES:
            setattr(os, name, trap(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def killed_everywhere(prepare: Callable[[int], Callable[[], object]], every: int = 1) -> Iterator[int]:
    """Yield the steps at which an action could be killed, after it was: all of them, or each `every`-th.

    Which of them is drawn anew in each run of the tests.
    """
    for step in range(random.randrange(every), 400, every):
        if not killed_at(step, prepare(step)):
            assert step > 25
            return
        yield step
    pytest.fail("it takes more than 400 steps")


def make(store: Store, identity: tuple[str, dict], experiment: str = "smoke", run: str = "first") -> Record:
    """Make, or take what is there, as an asset does."""
    fingerprint, payload = identity
    with store.work_area(experiment, "a", fingerprint) as work:
        if (record := store.reusable(experiment, "a", fingerprint)) is not None:
            return store.renew(work, record, inputs=[], blocking_checks=[], run=run)
        if not (work.run / "log.txt").exists():
            fill(work, manifest={"rows": 1, "git_sha": run})
            (work.path / "metrics.jsonl").write_text("{}\n")
            (work.run / "log.txt").write_text(run)
        return store.publish(work, draft(payload, dagster_run_id=run))


def assert_whole(store: Store, record: Record) -> None:
    """A version is what its record says, alone of its kind, sealed, in the ledger, and no work is left."""
    assert verify_record(store, record) == []
    assert store.require(record.experiment, "a").record_digest == record.record_digest
    assert files_below(store.payload(record)) == FILES
    assert store.ledger.get(record.record_digest) == record
    assert list(store.damaged()) == []
    for path in store.directory(record).rglob("*"):
        assert path.is_dir() or not path.stat().st_mode & 0o222, path
    work = store.root / ".work" / record.experiment
    assert [path.name for path in work.iterdir() if path.name != ".locks"] == []


def test_killed_at_any_step_of_publishing_nothing_half_is_visible_and_the_next_attempt_loses_nothing(
    tmp_path,
):
    identity = recipe("a")
    visible = []

    def prepare(step: int) -> Callable[[], object]:
        store = Store(tmp_path / str(step))
        return lambda: make(store, identity)

    for step in killed_everywhere(prepare):
        store = Store(tmp_path / str(step))
        seen = store.find("smoke", "a")
        visible.append(seen is not None)
        if seen is not None:
            assert verify_record(store, seen) == []
            assert store.require("smoke", "a") == seen
        made = any(path.read_text() == "first" for path in store.root.rglob("log.txt"))
        again = make(store, identity, run="second")
        assert_whole(store, again)
        assert seen is None or again == seen
        assert store.versions("smoke", "a") == [again.version]
        assert list(store.ledger.digests()) == [again.record_digest]
        if made:  # from then on the payload is never lost, nor how it was made
            log = (store.directory(again) / "run" / "log.txt").read_text()
            assert log == "first"
    assert visible == sorted(visible), "an artifact that was visible may not vanish"
    assert any(visible)


def test_killed_again_while_recovering_still_loses_nothing(tmp_path):
    identity = recipe("a")
    store = Store(tmp_path)
    for step in range(400):
        if not killed_at(step, lambda: make(store, identity)) or store.latest("smoke", "a") is not None:
            break
    record = make(store, identity)
    assert_whole(store, record)
    assert sorted(files_below(store.directory(record) / "run")) == ["log.txt", "metrics.jsonl"]


def test_killed_at_any_step_of_reuse_in_another_experiment_the_original_stays_and_the_next_attempt_succeeds(
    tmp_path,
):
    identity = recipe("a")

    def prepare(step: int) -> Callable[[], object]:
        store = Store(tmp_path / str(step))
        make(store, identity)
        return lambda: make(store, identity, "other", "second")

    for step in killed_everywhere(prepare, every=2):
        store = Store(tmp_path / str(step))
        original = store.require("smoke", "a")
        assert_whole(store, original)
        seen = store.find("other", "a")
        again = make(store, identity, "other", "third")
        assert seen is None or again == seen
        assert_whole(store, again)
        assert_whole(store, original)
        assert os.path.samefile(store.payload(original) / "data.bin", store.payload(again) / "data.bin")
        assert store.versions("other", "a") == [again.version]
        assert len(list(store.ledger.digests())) == 2


@pytest.mark.parametrize("what", ["removed", "payload"])
def test_killed_at_any_step_of_restoring_the_next_attempt_completes_it(tmp_path, what):
    identity = recipe("a")
    originals: dict[int, Record] = {}

    def prepare(step: int) -> Callable[[], object]:
        store = Store(tmp_path / str(step))
        record = originals[step] = make(store, identity)
        directory = store.directory(record)
        if what == "removed":
            shutil.rmtree(directory)
        else:
            damage(directory / "payload" / "data.bin", 50)
        return lambda: make(store, identity, run="second")

    for step in killed_everywhere(prepare, every=3):
        store = Store(tmp_path / str(step))
        restored = make(store, identity, run="third")
        assert restored == originals[step]
        assert_whole_but_for_evidence(store, restored, lost=what == "removed")
        said = [each for each in store.statements.about(restored) if each.kind == "restored"]
        assert len(said) == 1


def assert_whole_but_for_evidence(store: Store, record: Record, lost: bool) -> None:
    problems = verify_record(store, record)
    (statement,) = [each for each in store.statements.about(record) if each.kind == "restored"]
    assert statement.body["lost"] == (["log.txt"] if lost and statement.body["run"] != "first" else [])
    assert {problem.path.removeprefix("run/") for problem in problems} <= set(statement.body["lost"])
    assert store.require(record.experiment, "a") == record
    work = store.root / ".work" / record.experiment
    assert [path.name for path in work.iterdir() if path.name != ".locks"] == []


def test_published_files_are_at_no_moment_writable_while_they_are_linked(tmp_path, monkeypatch):
    """A failed renewal used to make them so, through the inode that both names share."""
    store = Store(tmp_path)
    identity = recipe("a")
    original = make(store, identity)
    files = [path for path in store.directory(original).rglob("*") if path.is_file()]
    for step in range(400):
        left = [step]

        def failing(function, left=left):
            def call(*arguments, **keywords):
                left[0] -= 1
                assert not any(path.stat().st_mode & 0o222 for path in files)
                if left[0] < 0:
                    raise OSError(5, "Input/output error")
                return function(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                make(store, identity, "other")
            except OSError:
                pass
            else:
                break
        assert not any(path.stat().st_mode & 0o222 for path in files)
        assert all(path.stat().st_mode & 0o400 for path in files)
        assert verify_record(store, original) == []
    else:
        pytest.fail("it takes more than 400 steps")
    assert_whole(store, make(store, identity, "other"))


PUBLISHER = """
import sys
from pathlib import Path
from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for n in range(10**6):
    files = {f"f{i}": bytes(1000) for i in range(20)}
    print(publish(store, "a", files=files, recipe_keys={"by": sys.argv[2], "n": n}).version, flush=True)
"""


def test_kill_9_of_a_publisher_at_any_moment_leaves_a_whole_store(tmp_path):
    store = Store(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said: list[str] = []
    for delay in (0.0, 0.037, 0.11, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(tmp_path), str(delay)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.kill()
        said += process.communicate()[0].split("\n")[:-1]
    records = list(store.records())
    assert {*said} <= {record.version for record in records}
    sequences = [record.sequence for record in records]
    assert sequences == sorted(set(sequences))
    for record in records:
        assert verify_record(store, record) == []
        assert store.ledger.get(record.record_digest) == record
    assert list(store.damaged()) == []
    assert publish(store, "a").sequence > max(sequences, default=0)
