"""The donors as assets: verified before anything is made of them."""

import json

import pytest

from tests.assets.graphs import NARROW_DONORS, Graph
from vpmoe_assets import hub
from vpmoe_assets.donors import tokenizers

pytestmark = pytest.mark.slow


@pytest.fixture
def donors(graph) -> Graph:
    return graph(NARROW_DONORS)


def test_both_donors_are_made_verified_and_reused(donors):
    run = donors.make("qwen3_0_6b", "gpt_oss_20b")
    for asset, tensors in (("qwen3_0_6b", 90), ("gpt_oss_20b", 3)):
        record = donors.latest(asset)
        assert record.metrics["tensors"] == tensors
        assert record.seed == 1234
        assert all(check.passed for check in run.checks(asset).values())
        assert {"architecture", "vocabulary"} & run.checks(asset).keys()
        assert "seed 1234" in run.metadata(asset)["source"]
        files = {row.data["path"] for row in run.metadata(asset)["files"].records}
        assert files == {entry.path for entry in record.files} >= {"config.json", "tokenizer.json"}
    assert donors.latest("qwen3_0_6b").metrics["num_layers"] == 8
    again = donors.make("qwen3_0_6b", "gpt_oss_20b")
    assert again.reused() == {"qwen3_0_6b": True, "gpt_oss_20b": True}


def test_a_tokenizer_that_is_not_the_published_one_stops_the_ladder(donors, monkeypatch):
    made = tokenizers.qwen3_tokenizer_json
    monkeypatch.setattr(tokenizers, "qwen3_tokenizer_json", lambda: made() + b"\n")
    run = donors.run("qwen3_0_6b", "qwen3_0_6b_o200k")
    assert run.started == ["qwen3_0_6b"]
    check = run.checks("qwen3_0_6b")["pinned_files"]
    assert not check.passed
    assert f"{tokenizers.QWEN3_TOKENIZER_SHA256} pinned" in check.description


def test_a_donor_of_another_geometry_stops_the_ladder(donors, monkeypatch):
    from vpmoe_assets.donors import checkpoints

    config = checkpoints.qwen3_config
    monkeypatch.setattr(checkpoints, "qwen3_config", lambda donor: {**config(donor), "rope_theta": 1e4})
    monkeypatch.setattr(tokenizers, "qwen3_tokenizer_json", lambda: b"{}")
    run = donors.run("qwen3_0_6b")
    check = run.checks("qwen3_0_6b")["architecture"]
    assert not check.passed
    assert "rope_theta: 10000.0 found, 1000000.0 expected" in check.description


def test_a_download_with_another_sha256_publishes_nothing(graph, monkeypatch):
    class Hub:
        def list_files(self, repo: str, repo_type: str, revision: str) -> list[hub.HubFile]:
            return [hub.HubFile(name, 2, None, "1" * 40) for name in ("config.json", "tokenizer.json")] + [
                hub.HubFile("model.safetensors", 2, "2" * 64)
            ]

        def read(self, *place: object):
            yield b"{}"

    monkeypatch.setattr("vpmoe_assets.donors.download.HuggingFaceHub", Hub)
    pins = {"config.json": "0" * 64}
    location = graph(
        {
            'kind = "seeded"\ntokenizer = "qwen3"': 'kind = "hub"\nrepo = "Qwen/Qwen3-0.6B"\n'
            f'revision = "{"a" * 40}"\nfiles = {json.dumps(pins).replace(":", " =")}\ntokenizer = "qwen3"'
        }
    )
    run = location.run("qwen3_0_6b")
    assert not run.success
    assert f"expected 2 bytes with {'0' * 64}; the partial file was removed" in run.error()
    assert location.store.latest("tiny", "qwen3_0_6b") is None
