"""The work area of a recipe: one holder, and what a killed attempt left is found again."""

from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.lineage.fabricate import draft, files_below, fill, recipe
from vpmoe_assets.lineage.errors import BusyError, RecordError
from vpmoe_assets.lineage.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork is meant


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


def test_a_work_area_that_was_being_removed_when_its_process_was_killed_is_gone_with_the_next(store):
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work)
        trash = work.path.with_name(f".{work.path.name}.trash")
        (trash / "checkpoints").mkdir(parents=True)
        store.publish(work, draft(payload))
    trash.mkdir(exist_ok=True)
    with store.work_area("smoke", "a", fingerprint):
        assert not trash.exists()
