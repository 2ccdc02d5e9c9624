"""Faulty data met by the graph: a message that says where and what to do, and nothing published."""

import json
import os
from pathlib import Path

import pytest

from tests.assets.graphs import Graph, rows_from
from tests.harmony import inputs
from vpmoe_assets.harmony import synth_harmony

CHAIN = ("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1")


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "rows"
    made.mkdir()
    return made


@pytest.fixture
def local(graph, folder) -> Graph:
    return graph(rows_from(folder))


def published(graph: Graph) -> list[str]:
    """Assets beyond the tokenizer that anybody could find."""
    return [record.asset for record in graph.store.records("tiny") if record.asset != "o200k_tokenizer"]


def test_a_truncated_parquet_file_is_named_before_any_work(local, folder):
    inputs.write(folder / "a.parquet", inputs.rows(5))
    bad = inputs.write(folder / "b.parquet", inputs.rows(40))
    os.truncate(bad, bad.stat().st_size // 2)
    run = local.run(*CHAIN)
    assert not run.success
    assert run.started == ["o200k_tokenizer", "synth"]
    assert run.error("synth").startswith(f"synth: {bad} is not a whole parquet file (truncated or damaged)")
    assert published(local) == []


def test_a_missing_column_is_named_with_what_was_found(local, folder):
    bad = inputs.write(folder / "a.parquet", inputs.rows(5), ("synth_id", "query", "synthetic_answer"))
    run = local.run(*CHAIN)
    assert f"{bad} has no column synthetic_reasoning; found synth_id, query, synthetic_answer" in run.error()
    assert published(local) == []


def test_rows_with_one_id_are_named_both(local, folder):
    content = inputs.rows(30)
    content[21]["synth_id"] = content[4]["synth_id"]
    inputs.write(folder / "a.parquet", content)
    run = local.run(*CHAIN)
    message = run.error("synth_kd_v1")
    assert f"duplicate synth_id {content[4]['synth_id']!r}: shard 00, row 4 " in message
    assert "shard 01, row 6 (synth_harmony_shard_01.parquet)" in message
    assert "Ids must be unique within a build; nothing was published" in message
    assert published(local) == ["synth", "synth_harmony"]


def test_only_incomplete_rows_are_refused(local, folder):
    inputs.write(folder / "a.parquet", [{**row, "synthetic_answer": None} for row in inputs.rows(3)])
    run = local.run(*CHAIN)
    assert "no row of 1 input files has all of query, synthetic_reasoning, synthetic_answer" in run.error()
    assert published(local) == ["synth"]


def _wrong_roles(text: str) -> str:
    turns = json.loads(text)["messages"]
    turns[2]["role"] = "tool"
    return json.dumps({"messages": turns})


def _missing_final(text: str) -> str:
    return json.dumps({"messages": json.loads(text)["messages"][:-1]})


MALFORMED = {
    "wrong roles": (_wrong_roles, "tool"),
    "missing final": (_missing_final, "final"),
    "bad JSON": (lambda text: text[:-7], "messages_json is not valid JSON"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_conversation_fails_the_build_and_says_which(graph, monkeypatch, fault):
    """The shards verify, so only the builder can notice: as with data of another program."""
    change, words = MALFORMED[fault]
    whole = synth_harmony.messages_json
    spoilt = []

    def messages_json(row, scaffold) -> str:
        text = whole(row, scaffold)
        if not spoilt and row["synth_id"].endswith("7"):
            spoilt.append(row["synth_id"])
            return change(text)
        return text

    monkeypatch.setattr(synth_harmony, "messages_json", messages_json)
    mine = graph()
    run = mine.run(*CHAIN)
    message = run.error("synth_kd_v1")
    assert message.startswith("synth_kd_v1: shard 00, row ")
    assert "(synth_harmony_shard_00.parquet), synth_id" in message
    assert f"synth_id {spoilt[0]!r}: " in message
    assert words in message.partition(spoilt[0])[2]
    assert "Nothing was published; correct or remove the row and build again" in message
    assert published(mine) == ["synth", "synth_harmony"]


@pytest.mark.parametrize("asset", ["synth_harmony", "synth", "o200k_tokenizer"])
def test_an_artifact_truncated_on_disk_is_refused_by_what_is_below_it(tiny, asset):
    record = tiny.latest(asset)
    file = record.files[0]
    victim = tiny.store.payload(record) / file.path
    victim.chmod(0o644)
    os.truncate(victim, file.size - 1)
    below = "synth_harmony" if asset == "synth" else "synth_kd_v1"
    before = list(tiny.store.records())
    run = tiny.run(below)
    assert f"tiny/{asset} is damaged: " in run.error()
    assert f"/payload/{file.path}: {file.size - 1} bytes, expected {file.size}" in run.error()
    assert list(tiny.store.records()) == before


def test_what_was_never_made_is_named(graph):
    mine = graph()
    run = mine.run("synth_kd_v1")
    assert run.error() == (
        f"synth_kd_v1: tiny/synth_harmony has not been published in {mine.root}; materialise it first"
    )
    assert published(mine) == []
