"""Cleaning up: what is kept is what pins and latest versions were made from, and a kill harms nothing."""

import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage import collecting
from vpmoe_assets.lineage.collected import collected_areas, pinned, removed_on_purpose
from vpmoe_assets.lineage.collecting import SORTS, collect, plan
from vpmoe_assets.lineage.errors import BusyError, CollectingError
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import RECORD_NAME, Objects
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_experiment


def say(store, record, kind, **body):
    return store.statements.append(Statement.about(record, kind, body))


def train(store, inputs=(), **fields):
    with_checkpoint = {"log.txt": b"log", "checkpoints/iter_1/x.distcp": b"c" * 1000}
    fingerprint_files = {"model.safetensors": os.urandom(20)}
    return publish_run(store, "model", inputs, fingerprint_files, with_checkpoint, **fields)


def publish_run(store, asset, inputs, files, run, **fields):
    from tests.lineage.fabricate import _counter, draft, fill, recipe

    fingerprint, payload = recipe(asset, inputs, variant=next(_counter))
    with store.work_area("smoke", asset, fingerprint) as work:
        fill(work, files)
        for name, content in run.items():
            (work.path / name).parent.mkdir(parents=True, exist_ok=True)
            (work.path / name).write_bytes(content)
        return store.publish(work, draft(payload, inputs, **fields))


def verified(store):
    found = verify_experiment(store, Index(store.root / "index.duckdb"), "smoke")
    return [str(each) for each in found.problems if each.kind != "witness"]


def going(store, sort, **options):
    return [item.what for item in plan(store, **options).items if item.sort == sort]


def test_what_is_kept_is_what_pins_and_latest_versions_were_made_from(store):
    old, mid, new = (publish(store, "data") for _ in range(3))
    model = publish(store, "model", (mid,))
    assert going(store, "payloads") == [version_name(old)]
    say(store, old, "pinned")
    assert going(store, "payloads") == []
    assert plan(store).kept == {
        version_name(old): "pinned",
        version_name(new): "latest",
        version_name(model): "latest",
        version_name(mid): f"{version_name(model)} was made from it",
    }
    say(store, old, "unpinned")
    assert going(store, "payloads") == [version_name(old)]
    assert going(store, "payloads", latest=3) == []


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=2)), max_size=9),
    st.sets(st.integers(0, 8), max_size=2),
)
def test_reachability_is_that_of_a_plain_search(tmp_path_factory, made, pins):
    store = Store(tmp_path_factory.mktemp("dag") / "artifacts")
    records = []
    for asset, parents in made:
        inputs = {p % len(records): records[p % len(records)] for p in parents} if records else {}
        records.append(publish(store, asset, tuple(inputs.values()), files={"x": b"x"}))
    wanted = {record.asset: number for number, record in enumerate(records)}
    stack = [*wanted.values(), *(number for number in pins if number < len(records))]
    for number in pins:
        if number < len(records):
            say(store, records[number], "pinned")
    kept = set()
    while stack:
        number = stack.pop()
        if number not in kept:
            kept.add(number)
            named = {ref.record_digest for ref in records[number].inputs}
            stack += [n for n, record in enumerate(records) if record.record_digest in named]
    assert set(plan(store).kept) == {version_name(records[number]) for number in kept}


def test_a_dry_run_changes_nothing(store):
    publish(store, "data")
    train(store)
    before = sorted(path for path in store.root.rglob("*") if ".work" not in path.parts)
    plan(store).to_dict()
    assert sorted(path for path in store.root.rglob("*") if ".work" not in path.parts) == before


def test_what_goes_is_stated_records_stay_and_the_store_verifies(store):
    old, new = (publish(store, "data", manifest={"rows": 1}) for _ in range(2))
    model = train(store, (new,))
    done = collect(store, ["payloads", "resume"], reason="disk full")
    assert [(item.sort, item.what) for item in done.items] == [
        ("payloads", version_name(old)),
        ("resume", version_name(model)),
    ]
    place = store.directory(old)
    assert [path.name for path in place.iterdir()] == [RECORD_NAME]
    assert not (store.directory(model) / "run" / "checkpoints").exists()
    assert (store.directory(model) / "run" / "log.txt").exists()
    (said,) = store.statements.about(model)
    assert (said.kind, said.reason, said.body["areas"]) == ("collected", "disk full", ["run/checkpoints"])
    assert removed_on_purpose(store.statements.about(old))
    assert not removed_on_purpose(store.statements.about(model))
    assert verified(store) == []
    assert store.require("smoke", "model") == model
    assert plan(store).items == ()
    (store.payload(model) / "model.safetensors").unlink()  # not what was collected
    assert len(verified(store)) == 1


def test_a_version_that_was_collected_is_restored_when_it_is_made_again(store):
    keys = {"same": 1}
    old = publish(store, "data", recipe_keys=keys)
    publish(store, "data")
    collect(store, ["payloads"])
    assert store.reusable("smoke", "data", old.fingerprint) is None
    publish(store, "data", recipe_keys=keys)
    assert collected_areas(store.statements.about(old)) == frozenset()
    assert verified(store) == []


def test_files_with_two_names_are_counted_once_and_free_nothing_alone(store):
    old = train(store)
    with store.work_area("full", "model", old.fingerprint) as work:
        store.renew(work, old, inputs=(), blocking_checks=(), run=None)
    found = plan(store)
    assert [item.size for item in found.items] == [1000, 1000]
    assert (found.size(), found.freed()) == (1000, 1000)
    say(store, old, "pinned")
    found = plan(store)
    assert (found.size(), found.freed()) == (1000, 0)


def test_pinned_checkpoints_stay(store):
    model = train(store)
    say(store, model, "pinned")
    assert pinned(store.statements.about(model))
    collect(store, list(SORTS))
    assert (store.directory(model) / "run" / "checkpoints").exists()


def test_objects_that_only_collected_versions_name_may_go_and_verify_knows(store):
    objects = ObjectStore(store.root)
    digests = [objects.put(name, "it") for name in (b"old", b"both", b"nobody", b"fresh")]
    for digest in digests[:3]:
        os.utime(objects.path(digest), (0, 0))
    old = publish(store, "data", objects=Objects(sources=digests[0], packages=digests[1]))
    publish(store, "data", objects=Objects(packages=digests[1]))
    collect(store, ["payloads", "objects"])
    assert [objects.has(digest) for digest in digests] == [False, True, False, True]
    assert ".objects" in collected_areas(store.statements.about(old))
    assert verified(store) == []


def test_nothing_goes_while_somebody_is_at_work_and_nobody_begins_meanwhile(store, monkeypatch):
    old, _ = publish(store, "data"), publish(store, "data")
    with store.work_area("smoke", "other", "0" * 64), pytest.raises(BusyError, match=r"at work .*other-0000"):
        collect(store, ["payloads"])
    assert store.payload(old).exists()

    def begin(*arguments):
        with (
            pytest.raises(BusyError, match="clean-up of the store"),
            store.work_area("smoke", "other", "0" * 64, wait_s=0),
        ):
            pass
        begun.append(True)

    begun = []
    monkeypatch.setattr(collecting, "_empty", begin)
    collect(store, ["payloads"])
    assert begun == [True]


def test_work_areas_without_a_job_go_and_others_stay(store):
    with store.work_area("smoke", "data", "1" * 64) as work:
        (work.path / "log.txt").write_text("half done")
    area = work.path
    assert plan(store, at_work=lambda path: path == area).skipped == (
        f"{area.relative_to(store.root)}: a job is on record there; see `vpmoe reap`",
    )
    collect(store, ["work"])
    assert not area.exists()


def test_half_written_files_of_killed_writers_go_and_young_ones_stay(store, monkeypatch):
    work, ledger = store.root / ".work", store.root / ".records"
    half = [ledger / ".ab.json.12.tmp", work / ".runs" / ".x.json.3.tmp", work / ".steps.json.4.tmp"]
    half += [work / ".sources" / ".ff00.0a1b" / "trainer", ledger / "ab" / ".abcd.json.5.6.tmp"]
    whole = [work / ".runs" / "x.json", work / ".sources" / "ff00" / "trainer", ledger / "ab" / "abcd.json"]
    for path in (*half, *whole, young := ledger / ".being-written.7.tmp"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    for path in (*half, half[3].parent):
        os.utime(path, (0, 0))
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 86_400)  # of this machine, not of the file system
    (found,) = [item for item in plan(store).items if item.what == "half-written files"]
    assert (found.sort, len(found.paths)) == ("work", len(half))
    collect(store, ["work"])
    assert not any(path.exists() for path in half)
    assert all(path.exists() for path in (*whole, young))


@pytest.mark.parametrize("at", range(8))
def test_a_kill_at_any_moment_leaves_a_store_that_verifies_and_the_next_goes_on(store, monkeypatch, at):
    old, new = (publish(store, "data", manifest={"rows": 1}) for _ in range(2))
    train(store, (new,))
    steps = []

    def dying(real):
        def step(*arguments, **options):
            if len(steps) == at:
                raise KeyboardInterrupt
            steps.append(real)
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(collecting.Path, "rename", dying(collecting.Path.rename))
        patched.setattr(collecting, "remove_tree", dying(collecting.remove_tree))
        patched.setattr(collecting.Path, "unlink", dying(collecting.Path.unlink))
        try:
            collect(store, ["payloads", "resume"])
        except KeyboardInterrupt:
            assert verified(store) == []
    collect(store, ["payloads", "resume", "work"])
    assert [path.name for path in store.directory(old).iterdir()] == [RECORD_NAME]
    assert verified(store) == []
    assert plan(store).items == ()
    assert not (store.root / ".work" / ".collected").exists()


def test_an_unreadable_record_stops_it(store):
    broken = publish(store, "data")
    path = store.directory(broken) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    with pytest.raises(CollectingError, match="nobody knows what it was made from"):
        plan(store)
