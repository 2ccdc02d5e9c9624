"""A store on a file system that two machines share: locks, stale caches, names of removed files, clocks."""

import time
from pathlib import Path

import pytest

from tests.lineage.fabricate import FILES, files_below, publish
from tests.lineage.test_concurrency import PROCESSES, assert_whole, publish_at_once
from tests.services.shared import CACHE_S
from vpmoe_assets.lineage.collecting import collect, plan
from vpmoe_assets.lineage.errors import BusyError
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_experiment

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(300)]

SHARED = ("one machine", "another")


def sound(root: Path) -> bool:
    """Whether every file of the store is what its record says, and its index knows of all."""
    store, index = Store(root), Index(root / "index.duckdb")
    index.update(store)
    found = verify_experiment(store, index, "smoke")
    return not found.problems


def test_what_is_being_made_on_one_machine_is_waited_for_on_the_other(machines):
    here, there = map(Store, machines)
    with here.work_area("smoke", "synth", "a" * 64) as work:
        (work.scratch / "half").write_text("of it")
        with (
            pytest.raises(BusyError, match=r"held by pid \d+ on "),
            there.work_area("smoke", "synth", "a" * 64, wait_s=0.3),
        ):
            raise AssertionError
    with there.work_area("smoke", "synth", "a" * 64) as work:  # and goes on from it
        assert (work.scratch / "half").read_text() == "of it"


def test_where_machines_know_nothing_of_each_others_locks_two_make_the_same(without_locks):
    """As docs/clusters.md says of `nolock`: nobody can tell, so it is for whoever mounts it."""
    here, there = map(Store, without_locks)
    with here.work_area("smoke", "synth", "a" * 64), there.work_area("smoke", "synth", "a" * 64, wait_s=0):
        pass


def test_a_hundred_artifacts_from_ten_processes_of_two_machines(machines):
    answers = publish_at_once([machines[number % 2] for number in range(PROCESSES)])
    time.sleep(CACHE_S)
    for machine in machines:
        assert_whole(machine, answers)
        assert sound(machine)


def test_what_one_machine_makes_removes_and_makes_again_is_what_the_other_finds(machines):
    here, there = map(Store, machines)
    assert there.find("smoke", "synth") is None  # and keeps that in mind for a while
    first = publish(here, "synth")
    time.sleep(CACHE_S)
    found = there.require("smoke", "synth")
    assert found == first
    second = publish(there, "synth")
    third = publish(here, "synth")  # whose listing of the versions may be older than the second
    assert len({each.version for each in (first, second, third)}) == 3
    assert (first.sequence, second.sequence, third.sequence) == (1, 2, 3)
    time.sleep(CACHE_S)
    with (there.payload(first) / "data.bin").open("rb") as reading:
        collect(here, ["payloads", "work"])
        assert reading.read() == FILES["data.bin"]
    time.sleep(CACHE_S)
    for machine, store in zip(machines, (here, there), strict=True):
        assert store.require("smoke", "synth") == third
        assert not (store.payload(first) / "data.bin").exists()
        assert sound(machine)
        assert plan(store).items == ()


def test_a_file_that_is_removed_while_it_is_read_is_in_nobodys_way(machines):
    here, _ = map(Store, machines)
    with here.work_area("smoke", "synth", "a" * 64) as work:
        (work.scratch / "log").write_text("x")
        with (work.scratch / "log").open() as reading:  # as `tail -f`, on the same machine
            work.clear()
            assert reading.read() == "x"
            (work.scratch / "log").write_text("y")
            assert files_below(work.scratch) == {"log": b"y"}
    old = publish(here, "synth")
    publish(here, "synth")
    with (here.payload(old) / "data.bin").open("rb") as reading:
        collect(here, ["payloads", "work"])
        assert reading.read() == FILES["data.bin"]
    assert sound(machines[0])
    collect(here, ["work"])
    assert [
        path.name for path in (machines[0] / ".work").rglob("*") if path.name[:5] in (".nfs0", ".fuse")
    ] == []
