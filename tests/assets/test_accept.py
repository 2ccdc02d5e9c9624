"""A harmless edit costs nothing once a person says so; nobody is misled about it."""

import json
import shutil

import pytest
from click.testing import CliRunner

from tests.assets.graphs import DATA, Graph
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.verify import verify_record

pytestmark = pytest.mark.slow

BECAUSE = "a constant that nobody reads"
SHORTER = {"seq_len = 1024\nvalid_fraction": "seq_len = 512\nvalid_fraction"}


def vpmoe(graph: Graph, *arguments: str, code: int = 0) -> str:
    with graph.environment():
        result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def edited(tiny, project_copy) -> Graph:
    """The tiny data, and a harmless edit in the code of synth_harmony and synth_kd_v1."""
    with (project_copy.root / "vpmoe_assets" / "harmony" / "synth_harmony.py").open("a") as source:
        source.write("\n\nUNREAD = 1\n")
    project_copy.read_again()
    return tiny


def test_an_accepted_edit_reuses_what_is_there_and_says_by_whose_word(edited):
    before = edited.latest("synth_harmony")
    said = vpmoe(edited, "accept", "synth_harmony", "--because", BECAUSE)
    assert "code changed: vpmoe_assets/harmony/synth_harmony.py" in said
    vpmoe(edited, "accept", "synth_kd_v1", "--because", "it reads no more of it")
    run = edited.make(*DATA)
    assert run.reused() == dict.fromkeys(DATA, True)
    assert edited.latest("synth_harmony").record_digest == before.record_digest
    assert f"synth_harmony: reused {before.version}; accepted as the same by " in run.log()
    assert "synth: reused" in run.log()
    assert BECAUSE in run.metadata("synth_harmony")["accepted"]
    assert BECAUSE in run.metadata("synth_harmony")["provenance"]
    assert "accepted" not in run.metadata("synth")
    assert BECAUSE in vpmoe(edited, "show", "synth_harmony", "-e", "tiny")
    assert "fresh; accepted (active)" in vpmoe(edited, "ls", "-e", "tiny")
    row, _ = json.loads(vpmoe(edited, "accept", "--list", "-e", "tiny", "--json"))
    assert (row["artifact"], row["state"], row["reason"]) == (
        f"tiny/synth_harmony/{before.version}",
        "active",
        BECAUSE,
    )
    assert "accepted already" in vpmoe(edited, "accept", "synth_harmony", "--because", "again", code=1)


def test_the_next_edit_needs_another_word(edited, project_copy):
    vpmoe(edited, "accept", "synth_harmony", "--because", BECAUSE)
    with (project_copy.root / "vpmoe_assets" / "harmony" / "synth_harmony.py").open("a") as source:
        source.write("\n\nMORE = 2\n")
    project_copy.read_again()
    assert edited.make("synth_harmony").reused() == {"synth_harmony": False}


def test_what_is_made_under_an_acceptance_names_it_and_hears_of_its_end(edited, graph):
    vpmoe(edited, "accept", "synth_harmony", "--because", BECAUSE)
    shorter = graph(SHORTER, root=edited.root, file="shorter")
    run = shorter.make(*DATA)
    assert [asset for asset, reused in run.reused().items() if not reused] == ["synth_kd_v1"]
    child = shorter.latest("synth_kd_v1")
    (statement,) = {ref.acceptance for ref in child.inputs if ref.asset == "synth_harmony"}
    assert {ref.acceptance for ref in child.inputs if ref.asset != "synth_harmony"} == {None}
    assert BECAUSE in run.metadata("synth_kd_v1")["accepted"]
    assert BECAUSE in vpmoe(shorter, "show", "synth_kd_v1")
    told = vpmoe(edited, "accept", "--withdraw", statement[:10], "--because", "not so sure")
    assert f"made meanwhile from it: synth_kd_v1@{child.version}" in told
    assert "already" in vpmoe(edited, "accept", "--withdraw", statement[:10], "--because", "x", code=1)
    assert "synth_harmony was accepted (withdrawn)" in vpmoe(shorter, "ls")
    assert "WITHDRAWN by" in vpmoe(shorter, "show", "synth_kd_v1")
    run = shorter.make("synth_harmony", "synth_kd_v1")
    assert run.reused() == {"synth_harmony": False, "synth_kd_v1": True}
    assert "came out the same" in run.log()
    (remark,) = Remarks(edited.store).inherited(child)
    assert (remark.state, remark.void) == ("reproduced", False)
    assert verify_record(edited.store, child) == []


def test_making_it_again_voids_what_was_wrongly_accepted(tiny, graph):
    shorter = graph(SHORTER, root=tiny.root, file="shorter")
    refused = vpmoe(shorter, "accept", "synth_kd_v1", "--because", "the length does not matter", code=1)
    assert "seq_len 1024 → 512" in refused
    assert "--recipe seq_len" in refused
    wrong = ["accept", "synth_kd_v1", "--because", "the length does not matter", "--recipe", "seq_len"]
    vpmoe(shorter, *wrong)
    before = shorter.latest("synth_kd_v1")
    assert shorter.make("synth_kd_v1").reused() == {"synth_kd_v1": True}
    shutil.rmtree(shorter.store.directory(before))
    run = shorter.make("synth_kd_v1")
    assert run.reused() == {"synth_kd_v1": False}
    assert "REFUTED" in run.log()
    (row,) = json.loads(vpmoe(shorter, "accept", "--list", "--json"))
    assert (row["artifact"], row["state"]) == (f"tiny/synth_kd_v1/{before.version}", "refuted")


def test_what_turned_out_different_is_not_accepted_even_when_that_is_gone(tiny, graph):
    shorter = graph(SHORTER, root=tiny.root, file="shorter")
    first = tiny.latest("synth_kd_v1")
    shorter.make("synth_kd_v1")
    shutil.rmtree(shorter.store.directory(shorter.latest("synth_kd_v1")))
    wrong = ["accept", f"synth_kd_v1@{first.version}", "--because", "no matter", "--recipe", "seq_len"]
    assert "was made with present code and recipe, and is different" in vpmoe(shorter, *wrong, code=1)


def test_an_acceptance_is_refused_where_nothing_shows_the_difference(edited):
    record = edited.latest("synth_harmony")
    assert record.objects.sources is not None
    path = ObjectStore(edited.root).path(record.objects.sources)
    path.chmod(0o644)
    path.unlink()
    assert "snapshot that shows the difference is gone" in vpmoe(
        edited, "accept", "synth_harmony", "--because", BECAUSE, code=1
    )
    assert edited.make("synth_harmony").reused() == {"synth_harmony": False}


def test_what_was_made_with_present_code_is_not_accepted_for_it(edited):
    old = edited.latest("synth_harmony").version
    assert edited.make("synth_harmony").reused() == {"synth_harmony": False}
    assert "nothing to accept" in vpmoe(edited, "accept", "synth_harmony", "--because", BECAUSE, code=1)
    assert "was made with present code and recipe, and is the same" in vpmoe(
        edited, "accept", f"synth_harmony@{old}", "--because", BECAUSE, code=1
    )


def test_an_accepted_version_that_is_not_the_latest_becomes_it_again(edited, graph):
    """The recipe was changed and changed back, and the code edited meanwhile."""
    first = edited.latest("synth_kd_v1")
    shorter = graph(SHORTER, root=edited.root, file="shorter")
    shorter.make("synth_harmony", "synth_kd_v1")
    vpmoe(edited, "accept", f"synth_kd_v1@{first.version}", "--because", BECAUSE)
    run = edited.make("synth_kd_v1")
    assert run.reused() == {"synth_kd_v1": True}
    again = edited.latest("synth_kd_v1")
    assert (again.sequence, again.digest, again.fingerprint) == (3, first.digest, first.fingerprint)
    assert again.original.record_digest == first.record_digest
    assert BECAUSE in run.metadata("synth_kd_v1")["accepted"]
    assert edited.make("synth_kd_v1").reused() == {"synth_kd_v1": True}
    assert edited.latest("synth_kd_v1").version == again.version, "a further run publishes nothing"
    assert "accepted already" in vpmoe(edited, "accept", "synth_kd_v1", "--because", "again", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["accept", "synth_harmony"], 1, "say why, with --because"),
        (["accept", "synth_harmny", "--because", "x"], 1, "synth_harmony"),
        (["accept", "other/synth_harmony", "--because", "x"], 1, "other/synth_harmony is not in"),
        (["accept"], 2, "name an ASSET"),
        (["accept", "synth", "--list"], 2, "name an ASSET"),
        (
            ["accept", "synth", "--check", "files_match_manifest", "--because", "x"],
            1,
            "passed; there is nothing",
        ),
        (["accept", "synth", "--check", "x", "--recipe", "k", "--because", "x"], 2, "no part in it"),
        (["accept", "--withdraw", "0123", "--because", "x"], 1, "no statement of acceptance begins with"),
    ],
)
def test_what_cannot_be_accepted_is_answered_in_one_line(edited, arguments, code, message):
    assert message in vpmoe(edited, *arguments, code=code)
