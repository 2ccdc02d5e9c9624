"""`vpmoe rerun` for real: Dagster's command runs the snapshot of a record in a store of its own."""

import json

import pytest
from click.testing import CliRunner

from tests.assets.graphs import write_experiment
from vpmoe_assets.cli import main


@pytest.fixture
def rerun(tiny, monkeypatch, forks):
    """Rerun an asset of the tiny experiment; returns the answer and the exit code."""
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tiny.root))
    monkeypatch.setenv("VPMOE_EXPERIMENT", str(tiny.experiment))
    monkeypatch.setenv("VPMOE_WORKERS", "1")

    def run(*arguments):
        with forks.below():
            result = CliRunner().invoke(main, ["rerun", *arguments, "--json"])
        assert result.exit_code in (0, 3), result.stderr
        return json.loads(result.stdout), result.exit_code

    return run


def test_what_is_made_again_from_its_record_is_the_same_and_that_is_stated(tiny, rerun):
    record = tiny.latest("synth_harmony")
    before = {path: path.stat().st_ctime_ns for path in tiny.store.directory(record).rglob("*")}
    answer, code = rerun("synth_harmony")
    assert (code, answer["reproduced"], answer["made"]) == (0, True, record.digest)
    assert answer["difference"] == {"identity": None, "step": None, "file": None}
    (said,) = [each for each in tiny.store.statements.about(record) if each.kind == "reproduced"]
    assert said.id == answer["statements"][0]["id"]
    assert said.body["fingerprint"] == record.fingerprint
    assert not list((tiny.root / ".work" / "reruns").iterdir()), "what is the same is not kept"
    assert {path: path.stat().st_ctime_ns for path in before} == before, "nothing about what is published"
    assert tiny.store.scan("tiny", "synth_harmony")[0][-1].version == record.version


def test_with_another_seed_the_first_file_that_differs_is_named_and_an_acceptance_of_it_is_void(
    tiny, rerun, tmp_path, monkeypatch
):
    record = tiny.latest("synth")
    other = write_experiment(tmp_path / "other.toml", {"\nseed = 1234\n": "\nseed = 4321\n"})
    monkeypatch.setenv("VPMOE_EXPERIMENT", str(other))
    accept = ["accept", "synth", "--recipe", "seed", "--because", "rows are rows"]
    accepted = CliRunner().invoke(main, accept)
    assert accepted.exit_code == 0, accepted.stderr
    answer, code = rerun("synth", "--now")
    assert (code, answer["reproduced"], answer["same_fingerprint"]) == (3, False, False)
    assert answer["difference"]["identity"]["recipe"] == [{"name": "seed", "old": "1234", "new": "4321"}]
    assert answer["difference"]["file"]["path"] in {entry.path for entry in record.files}
    assert "from byte" in answer["difference"]["file"]["what"]
    assert [each["kind"] for each in answer["statements"]] == ["refuted"]
    kinds = [each.kind for each in tiny.store.statements.about(record)]
    assert "not_reproduced" not in kinds, "its own recipe was not tried"
    assert kinds[-1] == "refuted"
