"""`vpmoe pin`, `unpin` and `gc` as their users meet them."""

import json

import pytest
from click.testing import CliRunner

from tests.lineage.fabricate import publish
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    return Store(tmp_path / "artifacts")


def run(*arguments, code=0):
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def test_a_pin_keeps_a_version_until_it_is_taken_back(store):
    old, _ = publish(store, "synth"), publish(store, "synth")
    name = f"synth@{old.version}"
    assert "nothing is pinned" in run("pin")
    assert "pinned by" in run("pin", name, "--because", "the paper")
    assert "is pinned already" in run("pin", name)
    assert [row["reason"] for row in json.loads(run("pin", "--json"))] == ["the paper"]
    assert json.loads(run("gc", "--json"))["sorts"]["payloads"]["items"] == []
    assert "unpinned by" in run("unpin", name)
    assert "is not pinned" in run("unpin", name)
    assert "nothing is pinned" in run("pin")
    assert "name it" in run("pin", "--because", "x", code=2)


def test_gc_shows_sizes_and_deletes_only_what_it_is_told_to(store):
    old, _ = publish(store, "synth"), publish(store, "synth")
    table = run("gc", "--list")
    assert "Nothing was removed" in table
    assert f"smoke/synth/{old.version}" in table
    run("gc", "--dry-run", "--delete", "payloads")
    assert store.payload(old).exists()
    assert "needs --delete" in run("gc", "--because", "x", code=2)
    answer = json.loads(run("gc", "--delete", "payloads", "--because", "full", "--json"))
    assert answer == {"deleted": {"payloads": 309}, "freed": 309}
    assert not store.payload(old).exists()
    assert "all intact" in run("verify")
    assert "removed: resume; 0 B freed" in run("gc", "--delete", "resume")
