"""The documented questions are answered as the text says, by the verb and by DuckDB itself."""

import json
import re

import duckdb
import pytest
from click.testing import CliRunner

from tests.lineage.fabricate import publish
from tests.lineage.test_index import KD_MANIFEST, curve
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

TEXT = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
QUESTIONS = {
    title: re.search(r"```sql\n(.*?)```", body, re.DOTALL)[1].strip()
    for title, body in re.findall(r"^## (\d+)\. [^\n]+\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A ladder of two rungs, the second made twice; a store for questions only."""
    store = Store(tmp_path_factory.mktemp("questions") / "artifacts")
    synth = publish(store, "synth", recipe_keys={})
    publish(store, "copy", experiment="full")
    kd = publish(store, "synth_kd_v1", (synth,), manifest=KD_MANIFEST, recipe_keys={})
    vpmoe = publish(store, "vpmoe", metrics={"parameters": 10, "num_layers": 2})
    stages = [
        publish(
            store,
            "vpmoe_stage1",
            (vpmoe, kd),
            files={"data.bin": str(rate).encode()},
            recipe_keys={"training": {"lr": rate, "steps": 9}},
            metrics={"parameters": 10, "valid_loss": loss},
            run={"metrics.jsonl": curve([1, 2])},
            execution={"device": "cpu", "nproc": 2},
        )
        for rate, loss in ((0.01, 3.5), (0.02, 2.5))
    ]
    score = {"object_asset": "vpmoe_stage1", "suite": "core8", "task": "mean"}
    publish(
        store,
        "eval_vpmoe_stage1",
        (stages[1],),
        evals=[score | {"object_version": stage.version, "score": 0.1 * n} for n, stage in enumerate(stages)],
    )
    figures = [("ms_per_step/p50", 5.0, "ms"), ("mfu", 0.25, "share"), ("parts/loss", 2.0, "ms")]
    publish(
        store,
        "perf_profile",
        perf=[
            {"name": name, "value": value, "unit": unit, "device": "cpu", "context": {}}
            for name, value, unit in figures
        ],
    )
    store.statements.append(Statement.about(vpmoe, "pinned", reason="for the paper"))
    publish(store, "synth", recipe_keys={"n": 1}, files={"other": b"1"})
    Index(store.root / "index.duckdb").rebuild(store)
    return store


@pytest.fixture
def ask(store, monkeypatch):
    """The rows of an answer, the same from the verb and from DuckDB."""
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(store.root))

    def answer(sql):
        result = CliRunner().invoke(main, ["sql", sql, "--json"])
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        with duckdb.connect(store.root / "index.duckdb", read_only=True) as database:
            plain = database.execute(sql)
            columns = [column[0] for column in plain.description]
            theirs = [dict(zip(columns, row, strict=True)) for row in plain.fetchall()]
        assert sorted(map(repr, json.loads(json.dumps(theirs, default=str)))) == sorted(
            repr(
                {key: (value.replace("T", " ") if key == "time_utc" else value) for key, value in row.items()}
            )
            for row in rows
        )
        return rows

    return answer


def of(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]


def versions(store, asset):
    return store.versions("smoke", asset)


def test_there_are_as_many_as_promised():
    assert len(QUESTIONS) >= 12


def test_the_ladder(ask):
    assert of(ask(QUESTIONS["1"]), "rung", "asset", "valid_loss") == [
        (0, "vpmoe", None),
        (1, "vpmoe_stage1", 2.5),
    ]


def test_what_a_checkpoint_came_from(ask, store):
    rows = ask(QUESTIONS["2"])
    assert of(rows, "depth", "ancestor_asset") == [(1, "synth_kd_v1"), (1, "vpmoe"), (2, "synth")]
    stage = store.latest("smoke", "vpmoe_stage1")
    same = ask(f"SELECT * FROM ancestors_of('{stage.record_digest}')")
    assert of(same, "depth", "asset", "digest") == of(rows, "depth", "ancestor_asset", "ancestor_digest")


def test_what_was_made_from_a_data_set(ask, store):
    rows = ask(QUESTIONS["3"])
    first, second = versions(store, "vpmoe_stage1")
    assert of(rows, "depth", "descendant_asset") == [
        (1, "synth_kd_v1"),
        (2, "vpmoe_stage1"),
        (2, "vpmoe_stage1"),
        (3, "eval_vpmoe_stage1"),
    ]
    old = store.find("smoke", "synth", versions(store, "synth")[0])
    same = ask(f"SELECT * FROM descendants_of('{old.record_digest}')")
    assert of(same, "depth", "asset", "version")[1:3] == [
        (2, "vpmoe_stage1", v) for v in sorted((first, second))
    ]


def test_what_changed_between_two_dates(ask, store):
    rows = ask(QUESTIONS["4"])
    assert {row["asset"] for row in rows} == {*store.assets("smoke"), "copy"}
    assert all(row["version_then"] is None for row in rows)
    first, second = (store.find("smoke", "vpmoe_stage1", v) for v in versions(store, "vpmoe_stage1"))
    since = f"SELECT * FROM changed_between('{first.published_utc[:23]}', '{second.published_utc[:23]}')"
    rows = [row for row in ask(since) if row["asset"] == "vpmoe_stage1"]
    assert of(rows, "version_then", "version_now", "other_content", "other_recipe", "other_sources") == [
        (first.version, second.version, True, True, False)
    ]


def test_what_happened_and_who_said_what(ask):
    rows = ask(QUESTIONS["5"])
    assert of(rows, "asset", "change")[0] == ("synth", "new content")
    assert [row["reason"] for row in rows if row["change"] == "pinned"] == ["for the paper"]


def test_who_scores_best(ask, store):
    first, second = versions(store, "vpmoe_stage1")
    assert of(ask(QUESTIONS["6"]), "place", "object_version") == [(1, second), (2, first)]


def test_what_a_rung_cost(ask):
    """Each took 90 s; what came before it is counted once."""
    assert of(ask(QUESTIONS["7"]), "asset", "hours", "with_ancestry", "attempts") == [
        ("vpmoe", 0.025, 0.025, 1),
        ("vpmoe_stage1", 0.025, 0.1, 1),
    ]
    assert of(ask("SELECT processes FROM cost ORDER BY rung"), "processes") == [(1,), (2,)]


def test_which_checkpoints_saw_a_shard(ask, store):
    expected = [("vpmoe_stage1", version, "synth_kd_v1") for version in versions(store, "vpmoe_stage1")]
    assert of(ask(QUESTIONS["8"]), "asset", "version", "data") == expected
    assert of(ask(f"SELECT * FROM saw_shard('{'b' * 64}')"), "asset", "version", "data") == expected
    assert ask("SELECT * FROM saw_shard('shard_0')") == []


def test_what_is_out_of_date(ask, store):
    old, new = versions(store, "synth")
    rows = ask(QUESTIONS["9"])
    assert [each for each in of(rows, "asset", "reason", "cause") if each[1] != "recipe"] == [
        ("eval_vpmoe_stage1", "ancestor", "synth"),
        ("synth_kd_v1", "input", "synth"),
        ("vpmoe_stage1", "ancestor", "synth"),
    ]
    assert {(row["used_version"], row["current_version"]) for row in rows if row["cause"] == "synth"} == {
        (old, new)
    }


def test_which_recipe_values_differ(ask):
    assert of(ask(QUESTIONS["10"]), "key", "before", "now") == [("training.lr", "0.01", "0.02")]


def test_a_value_of_the_recipe_against_a_number(ask):
    assert of(ask(QUESTIONS["11"]), "learning_rate", "valid_loss") == [(0.01, 3.5), (0.02, 2.5)]


def test_where_the_disk_goes(ask):
    rows = ask(QUESTIONS["12"])
    assert {"payload", "run", "manifest"} == {row["area"] for row in rows}
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)


def test_where_else_a_file_is(ask):
    assert ("full", "copy") in of(ask(QUESTIONS["13"]), "experiment", "asset")


def test_how_fast_a_step_was(ask):
    assert of(ask(QUESTIONS["14"]), "asset", "device", "step_ms", "mfu", "peak_gib") == [
        ("perf_profile", "cpu", 5.0, 0.25, None)
    ]
    assert of(ask("SELECT phase, ms FROM phases"), "phase", "ms") == [("loss", 2.0)]
