"""The page of a job at work: its curve as far as it has come, looked at again while it moves."""

import json
import os
import re
import shutil
import time

import pytest

from tests.browse.conftest import HOSTILE, POINTS, metrics
from tests.browse.test_pages import Shape, text
from tests.lineage.fabricate import publish
from vpmoe_assets.browse.links import Links, at_work
from vpmoe_assets.browse.pages import PageMissing, Pages
from vpmoe_assets.lineage.store import Store

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one source, and with a job whose points and state each test writes."""
    store = Store(tmp_path_factory.mktemp("at-work") / "artifacts")
    publish(store, "synth")
    return store


@pytest.fixture
def work(store):
    work = store.root / ".work" / "smoke" / "vpmoe_stage1-0a1b2c3d"
    work.mkdir(parents=True, exist_ok=True)
    (work / "job.json").write_text(json.dumps({"recipe": {"steps": 8}}))
    (work / "heartbeat").write_text(json.dumps({"phase": "train"}))
    (work / "STATUS").write_text("running\n")
    (work / "metrics.jsonl").write_bytes(metrics(POINTS))
    return work


def page(store, address=None):
    return Pages(store).render(Links(address or at_work("smoke", "vpmoe_stage1")))


def test_the_curve_of_a_job_grows_with_what_it_has_logged(store, work):
    (work / "metrics.jsonl").write_bytes(metrics(POINTS[:2]) + b'{"step": 3, "lo')
    first = page(store)
    assert "step 2 of 8" in text(first)
    assert first.count("<circle") == 4  # loss and one of its parts, two steps each
    (work / "metrics.jsonl").write_bytes(metrics([{**point, "step_ms": 30_000} for point in POINTS]))
    second = page(store)
    assert "step 5 of 8" in text(second)
    assert "time left, about 2 min" in text(second)
    assert second.count("<circle") == 10
    shape = Shape(second)
    assert not shape.open
    assert "script" not in shape.tags


def test_it_is_looked_at_again_only_while_something_may_change(store, work):
    def looks_again():
        return [REFRESH in page(store), REFRESH in page(store, "smoke/")]

    assert looks_again() == [True, True]
    (work / "STATUS").write_text("done\n")  # what it made is being published
    assert looks_again() == [True, True]
    (work / "STATUS").write_text(f"failed: loss is NaN {HOSTILE}\n")
    assert looks_again() == [False, False]
    assert "loss is NaN" in text(page(store))
    assert HOSTILE not in page(store)
    (work / "STATUS").write_text("running\n")
    long_ago = time.time() - 7000
    os.utime(work / "heartbeat", (long_ago, long_ago))
    assert looks_again() == [False, False]
    assert re.search(r"no sign of life for 70\d\d s: vpmoe reap", text(page(store)))


def test_the_overview_leads_to_it_and_a_site_neither_leads_there_nor_looks_again(store, work):
    shown = page(store, "smoke/")
    assert 'href="../smoke/vpmoe_stage1/at-work/"' in shown
    assert "5 of 8" in text(shown)
    written = Pages(store).render(Links("smoke/", files=True, there=frozenset({"", "smoke/"}), raw=()))
    assert REFRESH not in written
    assert "at-work" not in written


def test_half_written_files_of_a_job_are_no_fault(store, work):
    for name in ("job.json", "heartbeat", "metrics.jsonl"):
        (work / name).write_bytes(b'{"half')
    assert "No step is logged yet" in page(store)
    (work / "job.json").write_text(json.dumps({"recipe": {"steps": "many"}}))
    assert "step –" in text(page(store))


def test_when_it_is_published_its_page_leads_to_the_version(store, work):
    (work / "STATUS").unlink()
    assert "is being published" in text(page(store))
    assert REFRESH in page(store)
    shutil.rmtree(work)
    with pytest.raises(PageMissing, match="nothing is at work on smoke/vpmoe_stage1"):
        page(store)
    made = publish(store, "vpmoe_stage1")
    assert "Nothing is at work on it now" in text(page(store))
    assert made.version in page(store)
