"""A Dagster instance that knows nothing is told what the store holds, and judges it as after a run."""

import shutil

import dagster as dg
import pytest

from tests.assets.graphs import DATA, Graph
from tests.lineage.fabricate import publish, state_verdict
from vpmoe_assets.events.reporting import in_order, report_store, unreported
from vpmoe_assets.lineage.store import Store

NOT_COMPARED = ("dagster/input_event_pointer/", "vpmoe/reused", "vpmoe/reported")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def tags(instance, asset, experiment="smoke"):
    page = instance.fetch_materializations(dg.AssetKey([experiment, asset]), limit=1)
    return page.records[0].asset_materialization.tags


def versions(instance, asset):
    page = instance.fetch_materializations(dg.AssetKey(["smoke", asset]), limit=100)
    return [record.asset_materialization.tags["vpmoe/version"] for record in page.records]


def test_what_is_told_is_what_dagster_wrote_when_it_was_made(tiny, tiny_made):
    _, run = tiny_made
    reported = report_store(tiny.instance, tiny.store, "tiny")
    assert [name.split("/")[1] for name in reported.versions] != []
    written = {each.asset_key.path[-1]: each.tags for each in run.materializations}
    for asset in DATA:
        told = tags(tiny.instance, asset, "tiny")
        assert {k: v for k, v in told.items() if not k.startswith(NOT_COMPARED)} == {
            k: v for k, v in written[asset].items() if not k.startswith(NOT_COMPARED)
        }
        assert {k for k in told if k.startswith(NOT_COMPARED[0])} == {
            k for k in written[asset] if k.startswith(NOT_COMPARED[0])
        }
        assert tiny.stale(asset) == []
    key = dg.AssetCheckKey(dg.AssetKey(["tiny", "synth_kd_v1"]), "arrays_aligned")
    found = tiny.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    evaluation = found.event.dagster_event.asset_check_evaluation_data
    (event,) = tiny.instance.fetch_materializations(key.asset_key, limit=1).records
    assert evaluation.passed
    assert evaluation.target_materialization_data.storage_id == event.storage_id


def test_told_twice_nothing_is_added(tiny):
    first = report_store(tiny.instance, tiny.store, "tiny")
    assert unreported(tiny.instance, tiny.store, "tiny") == []
    again = report_store(tiny.instance, tiny.store, "tiny")
    assert (again.versions, again.known) == ([], len(first.versions))


def test_what_was_told_turns_stale_by_config_and_by_other_bytes_of_an_input_but_not_by_the_same(tiny, graph):
    report_store(tiny.instance, tiny.store, "tiny")

    def changed(rows: int) -> Graph:
        toml = graph({"row_group_rows = 2000": f"row_group_rows = {rows}"}, file=f"tiny{rows}").experiment
        return Graph(toml, tiny.root, tiny.instance)

    same = changed(1000)
    assert same.stale("synth_harmony") == ["has a new code version"]
    assert same.stale("synth_kd_v1") == []
    same.make("synth_harmony")
    assert same.stale("synth_harmony") == same.stale("synth_kd_v1") == []
    other = changed(10)
    other.make("synth_harmony")
    assert other.stale("synth_harmony") == []
    assert other.stale("synth_kd_v1") == ["has a new dependency data version"]


def test_every_version_is_told_inputs_before_what_is_made_of_them(tmp_path, instance):
    store = Store(tmp_path / "artifacts")
    first = publish(store, "zebra")
    made = publish(store, "ant", (first,))
    second = publish(store, "zebra", files={"x": b"2"})
    again = publish(store, "ant", (second,))
    order = [(head.asset, head.version) for head in in_order(store.heads("smoke"))]
    assert order == [(each.asset, each.version) for each in (first, made, second, again)]
    report_store(instance, store, "smoke")
    assert versions(instance, "ant") == [again.version, made.version]
    told = tags(instance, "ant")
    assert told["dagster/input_data_version/smoke/zebra"] == second.digest
    pointers = [
        record.storage_id
        for record in instance.fetch_materializations(dg.AssetKey(["smoke", "zebra"]), limit=1).records
    ]
    assert [int(told["dagster/input_event_pointer/smoke/zebra"])] == pointers
    assert tags(instance, "records") == {"dagster/data_version": again.record_digest}


def test_what_is_older_than_what_dagster_knows_is_left_out_and_what_is_newer_is_told(tmp_path, instance):
    store = Store(tmp_path / "artifacts")
    first, second = publish(store, "synth"), publish(store, "synth", files={"x": b"2"})
    hidden = tmp_path / "hidden"
    shutil.move(store.directory(first), hidden)
    report_store(instance, store, "smoke")
    shutil.move(hidden, store.directory(first))
    third = publish(store, "synth", files={"x": b"3"})
    assert [head.version for head in unreported(instance, store, "smoke")] == [third.version]
    reported = report_store(instance, store, "smoke")
    assert reported.versions == [f"smoke/synth/{third.version}"]
    assert reported.older == [f"smoke/synth/{first.version}"]
    assert versions(instance, "synth") == [third.version, second.version]


def test_a_failed_check_and_an_input_that_is_gone_are_told_too(tmp_path, instance):
    store = Store(tmp_path / "artifacts")
    gone = publish(store, "synth")
    made = publish(store, "kd", (gone,))
    state_verdict(store, made, name="aligned", passed=False, description="2 arrays")
    shutil.rmtree(store.directory(gone))
    report_store(instance, store, "smoke")
    assert tags(instance, "kd")["dagster/input_event_pointer/smoke/synth"] == "NULL"
    key = dg.AssetCheckKey(dg.AssetKey(["smoke", "kd"]), "aligned")
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    evaluation = found.event.dagster_event.asset_check_evaluation_data
    assert (evaluation.passed, evaluation.description, evaluation.blocking) == (False, "2 arrays", True)


def test_an_optional_input_that_was_not_there_is_told_as_a_run_tells_it(tmp_path, instance):
    store = Store(tmp_path / "artifacts")
    report = publish(store, "report", (publish(store, "eval_a"),))
    report_store(instance, store, "smoke", {"report": ["eval_a", "eval_b"]})
    assert report.version in versions(instance, "report")
    names = [dg.AssetKey(["smoke", name]) for name in ("eval_a", "eval_b")]
    evaluations = [
        dg.AssetsDefinition.from_op(
            dg.op(name=key.path[-1])(lambda: None), keys_by_output_name={"result": key}
        )
        for key in names
    ]

    @dg.asset(key=["smoke", "report"], deps=names)
    def made() -> None: ...

    told = tags(instance, "report")
    with dg.DagsterInstance.ephemeral() as other:
        publish_as = [dg.AssetMaterialization(names[0], tags={"dagster/data_version": "x"})]
        other.report_runless_asset_event(publish_as[0])
        dg.materialize([*evaluations, made], instance=other, selection=[made])
        written = tags(other, "report")
    absent = {key: value for key, value in written.items() if key.endswith("eval_b")}
    assert len(absent) == 2
    assert absent.items() <= told.items()
