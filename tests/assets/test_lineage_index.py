"""The index says what the records say, and the asset over it notices what no longer verifies."""

import json
import shutil
import subprocess
import sys
import time

import dagster as dg

from tests.assets.graphs import DATA, Graph, copy_store
from tests.lineage.fabricate import damage, publish
from vpmoe_assets.assets import lineage
from vpmoe_assets.lineage import hashcache
from vpmoe_assets.lineage.errors import IndexLockedError
from vpmoe_assets.lineage.index import TABLES, Index, records_digest
from vpmoe_assets.lineage.record import RECORD_NAME, Record, record_bytes


def tables(graph) -> dict[str, list[tuple]]:
    return {name: graph.index.query(f"SELECT * FROM {name} ORDER BY ALL").rows for name in TABLES}


def test_what_publishing_inserted_is_what_a_rebuild_makes(tiny):
    before = tables(tiny)
    assert {row[1] for row in before["artifacts"]} == set(DATA)
    assert before["inputs"]
    assert before["shards"]
    run = tiny.make("lineage_index")
    assert tables(tiny) == before
    tiny.index.path.unlink()
    tiny.index.rebuild(tiny.store)
    assert tables(tiny) == before
    digests = [record.record_digest for record in tiny.store.records()]
    (materialization,) = run.materializations
    assert materialization.tags["dagster/data_version"] == records_digest(digests) == tiny.index.digest()


def test_its_checks_and_counts_are_those_of_the_records(tiny):
    run = tiny.make("lineage_index")
    records = list(tiny.store.records())
    shown = run.metadata("lineage_index")
    assert shown["artifacts"] == len(records) == len(DATA)
    assert shown["inputs"] == sum(len(record.inputs) for record in records)
    assert shown["checks"] == sum(len(tiny.store.findings(record)) for record in records)
    checks = run.checks("lineage_index")
    assert {name: (check.passed, check.blocking) for name, check in checks.items()} == {
        "counts_equal_records": (True, True),
        "records_verify": (True, True),
    }


def test_it_comes_last_in_a_run_of_everything(tiny):
    run = tiny.make("lineage_index", *DATA)
    assert run.started[-1] == "lineage_index"


def test_a_rewritten_leaf_record_is_found_and_named_again_and_again(tiny):
    """Its digests agree, and nothing is made from it: only who knew it before can tell."""
    record = tiny.latest("healing_text_v1")
    path = tiny.store.directory(record) / RECORD_NAME
    fields = json.loads(path.read_bytes())
    del fields["record_digest"]
    written = Record.model_validate({**fields, "metrics": {**fields["metrics"], "loss": 0.1}})
    path.chmod(0o644)
    path.write_bytes(record_bytes(written))
    for _ in range(2):
        run = tiny.run("lineage_index")
        assert not run.success
        text = run.checks("lineage_index")["records_verify"].description
        assert f"tiny/healing_text_v1/{record.version}/{RECORD_NAME}: rewritten" in text
        assert "the index" in text
        assert record.record_digest in text
        assert not run.checks("lineage_index")["counts_equal_records"].passed


def test_dagster_remembers_where_the_index_was_lost(tiny_made, tmp_path):
    """Its latest materialisation of an asset names the record that there was."""
    made, _ = tiny_made
    mine = Graph(made.experiment, copy_store(made.root, tmp_path / "artifacts"), made.instance)
    record = mine.latest("healing_text_v1")
    shutil.rmtree(mine.store.directory(record))
    shutil.rmtree(mine.store.root / ".statements")
    mine.index.path.unlink()
    run = mine.run("lineage_index")
    text = run.checks("lineage_index")["records_verify"].description
    assert f"tiny/healing_text_v1/{record.version}/{RECORD_NAME}: no longer in the store" in text
    assert "Dagster and the ledger know of it" in text


def test_another_experiments_damage_and_what_was_published_meanwhile_fail_nothing(tiny, monkeypatch):
    other = publish(tiny.store, "synth", experiment="other")
    damage(tiny.store.payload(other) / "data.bin")
    real = lineage.verify_experiment

    def meanwhile(*arguments, **options):
        verified = real(*arguments, **options)
        publish(tiny.store, "synth_kd_v1", experiment="tiny")
        return verified

    monkeypatch.setattr(lineage, "verify_experiment", meanwhile)
    run = tiny.make("lineage_index")
    assert run.metadata("lineage_index")["artifacts"] == len(DATA) + 1


def test_it_is_out_of_date_once_something_was_published_and_only_then(graph):
    mine = graph()
    mine.make("o200k_tokenizer", "synth", "lineage_index")
    assert mine.stale("lineage_index") == []
    mine.make("o200k_tokenizer", "synth", "lineage_index")
    assert mine.stale("lineage_index") == [], "everything was reused"
    mine.make("synth_harmony")
    assert mine.stale("lineage_index") == ["has a new dependency data version"]
    mine.make("lineage_index")
    assert mine.stale("lineage_index") == []


def test_it_runs_last_also_after_a_failure_and_verifies_what_is_there(tiny, monkeypatch):
    record = tiny.latest("synth")
    damage(tiny.store.payload(record) / record.files[0].path, 100)
    run = tiny.run(*DATA, "lineage_index")
    assert run.started[-1] == "lineage_index"


def test_files_that_have_not_changed_are_not_read_again_but_those_that_have_are(tiny, monkeypatch):
    time.sleep(2.1)  # until their times are old enough to be trusted
    tiny.make("lineage_index")
    read = []
    real = hashcache.hash_files
    monkeypatch.setattr(hashcache, "hash_files", lambda files: read.extend(files) or real(files))
    tiny.make("lineage_index")
    assert read == []
    record = tiny.latest("synth")
    path = tiny.store.payload(record) / record.files[0].path
    damage(path, 100)
    assert not tiny.run("lineage_index").success
    assert read == [path]


def test_a_notebook_that_has_the_index_open_ends_no_run_and_is_made_up_for(graph):
    mine = graph()
    mine.make("o200k_tokenizer")
    program = "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True); print(); sys.stdin.read()"
    notebook = subprocess.Popen(
        [sys.executable, "-c", program, str(mine.index.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert notebook.stdout.readline() == "\n"
    try:
        log = mine.make("synth", "healing_corpus").log()
    finally:
        notebook.communicate("")
    assert log.count(f"locked by pid {notebook.pid}") == 2
    assert "the next publication makes up for it" in log
    assert mine.index.query("SELECT count(*) FROM artifacts").rows == [(1,)]
    mine.make("synth")
    assert mine.index.query("SELECT asset FROM artifacts ORDER BY 1").rows == [
        ("healing_corpus",),
        ("o200k_tokenizer",),
        ("synth",),
    ]


def test_an_index_that_is_being_written_fails_nothing(tiny, monkeypatch):
    def held(*_, **__):
        raise IndexLockedError("index.duckdb is locked by pid 1")

    monkeypatch.setattr(Index, "query", held)
    run = tiny.make("lineage_index")
    check = run.checks("lineage_index")["counts_equal_records"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "pid 1" in check.description


def test_damage_anywhere_fails_the_verification_and_is_named(tiny):
    record = tiny.latest("synth")
    damage(tiny.store.payload(record) / record.files[0].path, 100)
    run = tiny.run("lineage_index")
    assert not run.success
    checks = run.checks("lineage_index")
    assert checks["counts_equal_records"].passed
    assert not checks["records_verify"].passed
    text = checks["records_verify"].description
    assert text.startswith(f"tiny/synth/{record.version}/payload/{record.files[0].path}: sha256 ")
    assert "restored in its place" in text


def test_rows_that_publishing_missed_fail_the_counts_no_longer_after_a_rebuild(tiny):
    """An index that was lost, or is older than the store, is made again on the way."""
    tiny.index.path.write_bytes(b"no database")
    run = tiny.make("lineage_index")
    assert run.checks("lineage_index")["counts_equal_records"].passed
    assert {row[0] for row in tiny.index.query("SELECT asset FROM latest").rows} == set(DATA)
