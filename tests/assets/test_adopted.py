"""A data set that was made by hand is judged, shown, told to Dagster, and counts by a person's word."""

import json
import shutil

import dagster as dg
import pytest
from click.testing import CliRunner

from tests.assets.graphs import DATA, Graph
from tests.lineage.fabricate import damage
from vpmoe_assets.cli import main
from vpmoe_assets.events.reporting import report_store

pytestmark = pytest.mark.slow


def vpmoe(graph: Graph, *arguments: str, code: int = 0) -> str:
    with graph.environment():
        result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def by_hand(tiny, tmp_path):
    """Files like those of synth_harmony, lying elsewhere."""
    directory = tmp_path / "by_hand"
    made = tiny.store.directory(tiny.latest("synth_harmony"))
    shutil.copytree(made / "payload", directory / "payload")
    shutil.copy(made / "manifest.json", directory / "manifest.json")
    return directory


def test_an_adopted_data_set_is_judged_shown_told_and_counts_by_a_persons_word(tiny, by_hand, graph):
    made = tiny.latest("synth_harmony")
    tiny = graph({"row_group_rows = 2000": "row_group_rows = 1000"}, root=tiny.root)
    refused = vpmoe(tiny, "adopt", str(by_hand), "--as", "synth_harmony", code=1)
    assert f"synth_harmony@{made.version} was made here; say --replace" in refused
    given = ["adopt", str(by_hand), "--as", "synth_harmony", "--replace", "--because", "from the other lab"]
    told = json.loads(vpmoe(tiny, *given, "--json"))
    assert (told["new"], told["digest"], told["blocked_by"]) == (True, made.digest, [])
    assert set(told["checks"].values()) == {"passed"}
    adopted = tiny.latest("synth_harmony")
    assert adopted.sequence == made.sequence + 1

    assert f":{by_hand}, because: from the other lab" in vpmoe(tiny, "lineage", "synth_harmony", "--up")
    assert "not made by this code" in vpmoe(tiny, "why", "synth_harmony")
    row = next(
        each
        for each in json.loads(vpmoe(tiny, "ls", "--json"))["artifacts"]
        if each["asset"] == "synth_harmony"
    )
    assert (row["state"], [cause["kind"] for cause in row["causes"]]) == ("stale", ["adopted"])
    assert "which adopted it; what made it is not known" in vpmoe(tiny, "show", "synth_harmony")
    assert "nobody knows how" in vpmoe(tiny, "rerun", "synth_harmony", code=1)
    assert "all intact" in vpmoe(tiny, "verify", "--deep", "synth_harmony")

    report_store(tiny.instance, tiny.store, "tiny")
    key = dg.AssetKey(["tiny", "synth_harmony"])
    event = tiny.instance.fetch_materializations(key, limit=1).records[0].asset_materialization
    assert event.tags["vpmoe/version"] == adopted.version
    assert "from the other lab" in event.metadata["adopted"].value
    assert "has a new code version" in tiny.stale("synth_harmony")

    vpmoe(tiny, "accept", "synth_harmony", "--because", "I know who made it")
    run = tiny.make(*DATA)
    assert run.reused() == dict.fromkeys(DATA, True)
    assert tiny.latest("synth_harmony").version == adopted.version
    assert "NOT SHOWN: what made it, and of what: it was adopted" in vpmoe(tiny, "ls", "--json")


def test_one_that_its_checks_refuse_is_in_the_store_and_blocked(tiny, by_hand):
    shard = next((by_hand / "payload").glob("*.parquet"))
    shard.chmod(0o644)
    damage(shard, 200)
    said = vpmoe(tiny, "adopt", str(by_hand), "--as", "synth_harmony", "--replace", code=3)
    assert "failed, blocks" in said
    assert "manifest_matches_shards" in said
    assert tiny.store.blocked_by(tiny.latest("synth_harmony"))


def test_what_cannot_be_adopted_is_refused_in_a_line(tiny, by_hand):
    for given, said in {
        ("--as", "synth_harmon"): "did you mean synth_harmony?",
        ("--as", "synth_harmony@1"): "the store names the version; say --as synth_harmony",
    }.items():
        assert said in vpmoe(tiny, "adopt", str(by_hand), *given, code=1)
    inside = str(tiny.store.directory(tiny.latest("synth")))
    assert "lie within each other" in vpmoe(tiny, "adopt", inside, "--as", "synth", code=1)
    assert "lie within each other" in vpmoe(tiny, "adopt", str(tiny.root.parent), "--as", "synth", code=1)
