"""Failed checks: recorded and shown; blocking ones stop what is below, now and later."""

import json

import pytest
from click.testing import CliRunner

from tests.assets.graphs import DATA, Graph
from vpmoe_assets.cli import main
from vpmoe_assets.harmony import audit
from vpmoe_assets.lineage.errors import ArtifactBlocked
from vpmoe_assets.verdict import Verdict

FAULT = "shard_00 has 3 rows, the manifest says 4"


@pytest.fixture
def failing(monkeypatch) -> pytest.MonkeyPatch:
    """The manifest check of synth_harmony finds a fault until the patch is undone."""
    patch = pytest.MonkeyPatch()
    outcome = Verdict(False, FAULT, {"rows": 3})
    patch.setattr(audit, "harmony_manifest_matches", lambda payload, manifest: outcome)
    yield patch
    patch.undo()


def cli(graph: Graph, *arguments: str, code: int = 0):
    with graph.environment():
        result = CliRunner().invoke(main, [*arguments, "-e", "tiny"])
    assert result.exit_code == code, result.output
    return result


def test_a_failed_blocking_check_is_recorded_and_stops_what_is_below(graph, failing):
    mine = graph()
    run = mine.run("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1", "lineage_index")
    assert not run.success
    assert "synth_kd_v1" not in run.started
    record = mine.latest("synth_harmony")
    (outcome,) = mine.store.findings(record)
    assert (outcome.check, outcome.outcome, outcome.blocking) == ("manifest_matches_shards", "failed", True)
    assert (outcome.description, outcome.metadata) == (FAULT, {"rows": 3})
    assert mine.store.versions("tiny", "synth_kd_v1") == []
    shown = run.checks("synth_harmony")["manifest_matches_shards"]
    assert (shown.passed, shown.blocking, shown.severity.value) == (False, True, "ERROR")
    assert shown.description == FAULT
    assert "synth_harmony: check manifest_matches_shards FAILED" in run.log()
    assert run.made()[-1] == "lineage_index", "a rung that failed is in the index too"
    rows = mine.index.query("SELECT asset FROM checks WHERE NOT passed").rows
    assert rows == [("synth_harmony",)]


def test_what_a_check_blocks_stays_blocked_in_later_runs_until_it_passes(graph, failing):
    mine = graph()
    mine.run("o200k_tokenizer", "synth", "synth_harmony")
    later = mine.run("synth_kd_v1")
    assert not later.success
    version = mine.latest("synth_harmony").version
    assert later.error() == (
        f"synth_kd_v1: tiny/synth_harmony (version {version}) is blocked by its checks: "
        f"manifest_matches_shards: {FAULT}. Materialise it again, and its checks judge what is there anew"
    )
    assert mine.store.versions("tiny", "synth_kd_v1") == []
    with pytest.raises(ArtifactBlocked, match="manifest_matches_shards"):
        mine.store.require("tiny", "synth_harmony")
    assert "blocked: check manifest_matches_shards" in cli(mine, "ls").output
    assert FAULT in cli(mine, "path", "synth_harmony", code=1).stderr
    failing.undo()
    run = mine.make("synth_harmony", "synth_kd_v1")
    assert run.reused() == {"synth_harmony": True, "synth_kd_v1": False}, (
        "it was judged again, not made again"
    )
    assert mine.latest("synth_harmony").sequence == 1


def test_a_failed_check_that_does_not_block_warns_and_lets_the_rest_go_on(graph):
    """Sequences so short that most conversations are cut: nothing is wrong, and somebody should look."""
    mine = graph({"seq_len = 1024\nvalid_fraction": "seq_len = 300\nvalid_fraction"})
    run = mine.make("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1")
    shown = run.checks("synth_kd_v1")
    warned = shown.pop("truncation_counts")
    assert (warned.passed, warned.blocking, warned.severity.value) == (False, False, "WARN")
    touched, rows = (int(word) for word in warned.description.split() if word.isdecimal())
    assert rows / 2 < touched <= rows, "what was dropped was a conversation, too"
    assert all(check.passed and check.blocking for check in shown.values())
    record = mine.latest("synth_kd_v1")
    assert mine.store.blocked_by(record) == ()
    failed = [found.check for found in mine.store.findings(record) if found.outcome == "failed"]
    assert failed == ["truncation_counts"]
    assert mine.store.require("tiny", "synth_kd_v1") == record
    (row,) = json.loads(cli(mine, "ls", "--json").output)["artifacts"][-1:]
    assert (row["asset"], row["checks"], row["checks_passed"], row["state"]) == ("synth_kd_v1", 6, 5, "fresh")
    again = mine.make("synth_kd_v1")
    assert again.reused() == {"synth_kd_v1": True}
    assert not again.checks("synth_kd_v1")["truncation_counts"].passed, "reuse repeats what was found"


def test_every_check_of_the_data_ran_and_passed(tiny_made):
    graph, run = tiny_made
    for asset in DATA:
        found = graph.store.findings(graph.latest(asset))
        recorded = {finding.check: finding.outcome == "passed" for finding in found}
        assert recorded, asset
        assert {name: check.passed for name, check in run.checks(asset).items()} == recorded
        assert [name for name, passed in recorded.items() if not passed] == []
    sample = run.checks("synth_kd_v1")["sample_renders_alike"]
    assert "60 conversations rendered again, all equal" in sample.description
