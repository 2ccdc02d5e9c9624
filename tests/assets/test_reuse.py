"""Same recipe, code and inputs: the artifact that is there is used, and the run says so. Else it is made."""

import os
import sys

import pytest

from tests.assets.graphs import DATA, Graph, payload_bytes
from tests.lineage.fabricate import damage
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.verify import verify_record

pytestmark = pytest.mark.slow

SHORTER = {"seq_len = 1024\nvalid_fraction": "seq_len = 512\nvalid_fraction"}


def versions(graph: Graph) -> dict[str, list[str]]:
    return {asset: graph.store.versions("tiny", asset) for asset in graph.store.assets("tiny")}


def test_a_second_run_reuses_everything_and_says_so(tiny):
    before = versions(tiny)
    run = tiny.make(*DATA)
    assert run.reused() == dict.fromkeys(DATA, True)
    log = run.log()
    for asset in DATA:
        record = tiny.latest(asset)
        assert f"{asset}: reused {record.version}; its recipe, code and inputs are unchanged" in log
        assert run.metadata(asset)["version"] == record.version
    assert "(made with device=cpu processes=1, " in log
    assert versions(tiny) == before
    assert [path for path in (tiny.root / ".work" / "tiny").iterdir() if not path.name.startswith(".")] == []


def test_a_first_run_is_not_called_reused(tiny_made):
    graph, run = tiny_made
    assert run.reused() == dict.fromkeys(DATA, False)
    assert "reused" not in run.log()
    assert all(len(found) == 1 for found in versions(graph).values())


def test_a_changed_recipe_rebuilds_its_asset_and_what_changes_below_and_nothing_else(tiny, graph):
    changed = graph(SHORTER, root=tiny.root)
    run = changed.make(*DATA)
    assert [asset for asset, reused in run.reused().items() if not reused] == ["synth_kd_v1"]
    old, new = tiny.store.records("tiny"), changed.latest("synth_kd_v1")
    first = next(record for record in old if record.asset == "synth_kd_v1")
    assert new.recipe["seq_len"] == 512
    assert (new.sequence, first.sequence) == (2, 1)
    assert new.digest != first.digest
    assert new.inputs == first.inputs


def test_more_rows_rebuild_everything_that_came_from_them(tiny, graph):
    run = graph({"rows = 2000\n\n": "rows = 64\n\n"}, root=tiny.root).make(*DATA)
    made = {asset for asset, reused in run.reused().items() if not reused}
    assert made == {"synth", "synth_harmony", "synth_kd_v1"}
    assert run.metadata("synth_harmony")["dagster/row_count"] == 64


def test_going_back_to_an_earlier_recipe_makes_its_version_the_latest_again(tiny, graph):
    """Else the rows of the other recipe would be what every later run is built on."""
    other = graph({"rows = 2000\n\n": "rows = 64\n\n"}, root=tiny.root)
    other.make("synth", "synth_harmony")
    assert tiny.latest("synth").metrics["rows"] == 64
    run = tiny.make(*DATA)
    assert run.reused() == dict.fromkeys(DATA, True)
    first, _, third = [record for record in tiny.store.records("tiny") if record.asset == "synth"]
    assert (third.sequence, third.digest, third.fingerprint) == (3, first.digest, first.fingerprint)
    assert (third.original.version, third.original.record_digest) == (first.version, first.record_digest)
    assert f"synth: published {first.version} again as {third.version}" in run.log()
    assert tiny.latest("synth_harmony").metrics["rows"] == 60
    assert tiny.store.versions("tiny", "synth_kd_v1") == [run.metadata("synth_kd_v1")["version"]]
    assert versions(tiny) == (tiny.make(*DATA), versions(tiny))[1], "a further run publishes nothing"


def test_an_unreadable_newer_record_does_not_stay_in_the_way(tiny, graph):
    other = graph(SHORTER, root=tiny.root)
    other.make("synth_kd_v1")
    path = tiny.store.directory(other.latest("synth_kd_v1")) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    run = tiny.make("synth_kd_v1")
    assert run.reused() == {"synth_kd_v1": True}
    assert tiny.store.require("tiny", "synth_kd_v1").sequence == 3


def test_a_changed_source_file_rebuilds_the_steps_that_run_it(tiny, project_copy):
    render = project_copy.root / "vpmoe_assets" / "harmony" / "render.py"
    assert set(tiny.make(*DATA).reused().values()) == {True}, "the same code elsewhere is the same code"
    text = render.read_text()
    render.write_text(text + "# a comment\n")
    project_copy.read_again()
    assert set(tiny.make(*DATA).reused().values()) == {True}, "a comment is no code"
    render.write_text(text + "ADDED = 1\n")
    project_copy.read_again()
    run = tiny.make(*DATA)
    assert [asset for asset, reused in run.reused().items() if not reused] == ["synth_kd_v1"]
    first, second = [record for record in tiny.store.records("tiny") if record.asset == "synth_kd_v1"]
    assert first.fingerprint != second.fingerprint
    assert first.digest == second.digest
    changed = {
        path
        for path, digest in second.fingerprint_payload["sources"].items()
        if first.fingerprint_payload["sources"][path] != digest
    }
    assert changed == {"vpmoe_assets/harmony/render.py"}


def test_a_damaged_payload_is_refused_below_and_made_again_when_asked_for(tiny):
    before = tiny.latest("synth_harmony")
    shard = tiny.store.payload(before) / "synth_harmony_shard_01.parquet"
    content = shard.read_bytes()
    damage(shard, len(content) // 2)
    refused = tiny.run("synth_kd_v1")
    assert not refused.success
    message = refused.error()
    assert message.startswith("synth_kd_v1: tiny/synth_harmony is damaged")
    assert "payload/synth_harmony_shard_01.parquet: sha256" in message
    assert "Materialise it again" in message
    run = tiny.make("synth_harmony", "synth_kd_v1")
    assert run.reused() == {"synth_harmony": False, "synth_kd_v1": True}
    assert tiny.latest("synth_harmony") == before, "restored under its own record"
    assert shard.read_bytes() == content
    assert "synth_harmony: restored" in run.log()
    assert verify_record(tiny.store, tiny.latest("synth_kd_v1")) == []


@pytest.mark.parametrize("what", ["truncated", "removed", "added", "manifest"])
def test_every_kind_of_damage_is_noticed(tiny, what):
    record = tiny.latest("synth_kd_v1")
    payload = tiny.store.payload(record)
    before = payload_bytes(payload)
    victim = sorted(payload.rglob("*_span.bin"))[0]
    if what == "truncated":
        victim.chmod(0o644)
        os.truncate(victim, 10)
    elif what == "removed":
        victim.unlink()
    elif what == "added":
        (payload / "train" / "stray").write_bytes(b"")
    else:
        damage(tiny.store.directory(record) / "manifest.json", 30)
    run = tiny.make("synth_kd_v1")
    assert run.reused() == {"synth_kd_v1": False}
    assert payload_bytes(tiny.store.payload(tiny.latest("synth_kd_v1"))) == before
    assert tiny.latest("synth_kd_v1") == record


def test_a_step_that_loads_more_than_its_fingerprint_covers_says_so(graph, monkeypatch):
    from vpmoe_assets.generated import generator

    write = generator.write_synth

    def write_with_a_helper(*arguments):
        import vpmoe_assets.text.documents  # noqa: F401

        return write(*arguments)

    made = graph()
    assert "does not cover" not in made.make("synth").log()
    monkeypatch.setattr(generator, "write_synth", write_with_a_helper)
    monkeypatch.delitem(sys.modules, "vpmoe_assets.text.documents", raising=False)
    other = graph({"rows = 2000\n\n": "rows = 50\n\n"})
    log = other.make("synth").log()
    assert "synth: was made with vpmoe_assets.text.documents, which its fingerprint does not cover" in log
    assert "vpmoe_assets/codebase/words.py" in log
