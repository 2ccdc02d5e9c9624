"""The index says what the records say, and the asset over it notices what no longer verifies."""

from tests.assets.graphs import DATA
from tests.lineage.fabricate import damage
from vpmoe_assets.lineage.index import TABLES, records_digest


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
    (event,) = run.result.get_asset_materialization_events()
    tags = event.step_materialization_data.materialization.tags
    assert tags["dagster/data_version"] == records_digest(digests) == tiny.index.digest()


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
    assert text.endswith("Remove the version and materialise the asset again")


def test_rows_that_publishing_missed_fail_the_counts_no_longer_after_a_rebuild(tiny):
    """An index that was lost, or is older than the store, is made again on the way."""
    tiny.index.path.write_bytes(b"no database")
    run = tiny.make("lineage_index")
    assert run.checks("lineage_index")["counts_equal_records"].passed
    assert {row[0] for row in tiny.index.query("SELECT asset FROM latest").rows} == set(DATA)
