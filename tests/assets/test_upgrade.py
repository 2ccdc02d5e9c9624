"""Artifacts of the earlier schema: readable, verifiable, never rewritten, counting by a person's word.

The store is made by the code that wrote that schema last.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.assets.earlier import COMMIT, MADE, make_earlier_store
from tests.assets.graphs import Graph, copy_store, payload_bytes, write_experiment
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.verify import verify_record

pytestmark = pytest.mark.slow

BECAUSE = "the code that makes bytes was moved and not changed"


@pytest.fixture(scope="module")
def made(tmp_path_factory, forks) -> Path:
    return make_earlier_store(tmp_path_factory.mktemp("earlier"), forks)


@pytest.fixture
def earlier(made, tmp_path) -> Graph:
    """A graph of present code over a copy of the earlier store."""
    root = copy_store(made, tmp_path / "artifacts")
    return Graph(write_experiment(tmp_path / "tiny.toml"), root)


def vpmoe(graph: Graph, *arguments: str, code: int = 0) -> str:
    with graph.environment():
        result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def report(graph: Graph, *arguments: str, code: int = 0) -> dict[str, dict]:
    found = json.loads(vpmoe(graph, "upgrade", *arguments, "--json", code=code))
    return {row["asset"]: row for row in found["artifacts"]}


def records(graph: Graph) -> dict[str, bytes]:
    return payload_bytes(graph.root / "tiny", (".artifact.json",))


def upgraded(graph: Graph) -> dict[str, dict]:
    """Accept all three, whatever has changed in them since."""
    rows = report(graph).values()
    keys = [line.split()[1] for row in rows for line in row["differs"] if line.startswith("recipe ")]
    releases = [line.split()[1] for row in rows for line in row["differs"] if line.startswith("package ")]
    named = [word for key in keys for word in ("--recipe", key)]
    named += [word for release in releases for word in ("--package", release)]
    return report(graph, *MADE, "--because", BECAUSE, *named)


def test_they_are_read_and_verify(earlier):
    for asset in MADE:
        record = earlier.latest(asset)
        assert record.earlier
        assert record.schema_ == "vpmoe.artifact/1"
        assert (record.code.git_sha, record.code.git_dirty) == (COMMIT, False)
        assert verify_record(earlier.store, record) == []
        found = earlier.store.findings(record)
        assert found
        assert all(finding.outcome == "passed" and finding.version is None for finding in found)
        assert earlier.store.require("tiny", asset) == record
    assert "all intact" in vpmoe(earlier, "verify", "-e", "tiny")


def test_without_a_person_s_word_they_are_made_again(earlier):
    before = earlier.latest("synth")
    run = earlier.make("synth")
    assert run.reused() == {"synth": False}
    assert (earlier.latest("synth").digest, earlier.latest("synth").earlier) == (before.digest, False)


def test_upgrade_says_what_is_known_of_each_in_the_order_of_the_graph_and_changes_nothing(earlier):
    before = payload_bytes(earlier.root)
    rows = report(earlier)
    assert sorted(rows, key=list(rows).index) == [asset for asset in rows if asset in MADE]
    assert list(rows).index("synth") < list(rows).index("synth_harmony")
    for row in rows.values():
        assert f"commit {COMMIT[:12]}: clean, at hand, with the sources that were recorded" in row["shown"]
        assert row["unequal_inputs"] == []
        assert row["state"] in ("shown to be the same", "not all is shown")
    after = payload_bytes(earlier.root)
    assert {path for path in before if before[path] != after.get(path)} == set()
    assert {path.split("/")[0] for path in after.keys() - before.keys()} <= {".work"}


def test_an_asset_whose_input_does_not_count_is_refused(earlier, project_copy):
    with (project_copy.root / "vpmoe_assets" / "generated" / "generator.py").open("a") as source:
        source.write("\n\nADDED = 1\n")
    project_copy.read_again()
    rows = report(earlier, "synth_harmony", "--because", BECAUSE, code=1)
    assert "vpmoe_assets/generated/generator.py" in "".join(rows["synth"]["differs"])
    assert rows["synth"]["state"] == "not all is shown"
    assert "input synth: it does not count itself" in rows["synth_harmony"]["unknown"]
    assert rows["synth_harmony"]["state"] == "refused"
    assert "synth" in rows["synth_harmony"]["reason"]
    assert earlier.store.statements.of_asset("tiny", "synth_harmony", "accepted") == {}


def test_upgraded_artifacts_are_reused_under_their_old_records_and_every_view_says_so(earlier):
    before = records(earlier)
    rows = upgraded(earlier)
    assert {row["state"] for row in rows.values()} == {"accepted"}
    run = earlier.make(*MADE)
    assert run.reused() == dict.fromkeys(MADE, True)
    assert records(earlier) == before, "no record is rewritten, and none is added"
    for asset in MADE:
        record = earlier.latest(asset)
        found = {finding.check: finding for finding in earlier.store.findings(record)}
        assert all(finding.version for finding in found.values()), "present checks judged what is there"
        assert BECAUSE in run.metadata(asset)["accepted"]
        assert BECAUSE in run.metadata(asset)["provenance"]
    assert f"reused {record.version}" in run.log()
    assert BECAUSE in run.log()
    child = earlier.make("synth_kd_v1")
    assert child.reused() == {"synth_kd_v1": False}
    references = {ref.asset: ref.acceptance for ref in earlier.latest("synth_kd_v1").inputs}
    assert references == {asset: rows[asset]["statement"] for asset in references}
    assert BECAUSE in vpmoe(earlier, "show", "synth_kd_v1", "-e", "tiny")
    told = {remark.asset for remark in Remarks(earlier.store).inherited(earlier.latest("synth_kd_v1"))}
    assert told == set(references)
    assert {row["state"] for row in report(earlier).values()} == {"upgraded already"}
    assert verify_record(earlier.store, earlier.latest("synth_kd_v1")) == []


def test_an_upgraded_version_becomes_the_latest_again_after_another_recipe(earlier, tmp_path):
    upgraded(earlier)
    first = earlier.latest("synth")
    more = {"rows = 2000\n\n": "rows = 64\n\n"}
    Graph(write_experiment(tmp_path / "more.toml", more), earlier.root).make("synth")
    assert earlier.make("synth").reused() == {"synth": True}
    again = earlier.latest("synth")
    assert (again.sequence, again.digest, again.fingerprint) == (3, first.digest, first.fingerprint)
    assert (again.earlier, again.original.record_digest) == (False, first.record_digest)
    assert verify_record(earlier.store, again) == []
    assert report(earlier)["synth"]["state"] == "upgraded already"


def test_upgrade_asks_for_a_reason_and_for_names(earlier):
    for arguments in (["--yes"], ["--because", "x"], ["--yes", "synth", "--because", "x"], ["--recipe", "k"]):
        vpmoe(earlier, "upgrade", *arguments, code=2)
    vpmoe(earlier, "upgrade", "synht", "--because", "x", code=1)
