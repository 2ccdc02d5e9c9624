"""Dagster's events of a chain of ten, edited by hand in its SQLite files: a deep verification names them."""

import json
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from tests.lineage.fabricate import publish
from vpmoe_assets.cli import main
from vpmoe_assets.events.auditing import EventAudit
from vpmoe_assets.events.metadata import record_metadata
from vpmoe_assets.events.reporting import report_store
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import Look, verify_experiment
from vpmoe_assets.resources.told import instance_at

LENGTH = 10
OF_RUN, OF_ALL, OF_ASSET = "log of run", "index over all runs", "keeps with the asset"


@dataclass
class Told:
    """A store, and the Dagster home whose run made all that is in it."""

    store: Store
    home: Path
    records: list[Record]
    run: str

    @property
    def fifth(self) -> Record:
        return self.records[4]

    def edit(self, place: str, sql: str, *values: str) -> None:
        """Do something to the event of the fifth artifact, by hand."""
        name = self.run if place == OF_RUN else "index"
        key = json.dumps(["smoke", self.fifth.asset])
        table = "asset_keys" if place == OF_ASSET else "event_logs"
        column = "last_materialization" if place == OF_ASSET else "event"
        where = "asset_key = ?"
        if table == "event_logs":
            where += " AND dagster_event_type = 'ASSET_MATERIALIZATION'"
        with sqlite3.connect(self.home / "history" / "runs" / f"{name}.db") as database:
            done = database.execute(f"{sql.format(table=table, column=column)} WHERE {where}", (*values, key))
            assert done.rowcount == 1

    def replace(self, place: str, old: str, new: str) -> None:
        """Write another text into it."""
        self.edit(place, "UPDATE {table} SET {column} = replace({column}, ?, ?)", old, new)

    def delete(self, place: str) -> None:
        self.edit(place, "DELETE FROM {table}")

    def found(self) -> list[tuple[str, str, str, str]]:
        """Severity, kind, asset and message of all that a deep verification finds."""
        with instance_at(self.home) as instance:
            events = EventAudit(instance, ["smoke"])
        look = Look(audit=events, witnesses=events.sightings)
        done = verify_experiment(self.store, Index(self.store.root / "index.duckdb"), "smoke", look)
        found = [*done.found, *events.notes("smoke")]
        return [
            (p.severity, p.kind, p.artifact.split("/")[1], p.message) for p in found if "/" in p.artifact
        ] + [(p.severity, p.kind, "", p.message) for p in found if "/" not in p.artifact]

    def problems(self) -> list[str]:
        """Messages about the fifth artifact; requires that there is no problem with another."""
        found = [each for each in self.found() if each[0] == "problem"]
        assert {asset for _, _, asset, _ in found} <= {self.fifth.asset}
        return [message for *_, message in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("told")
    store, home = Store(root / "artifacts"), root / "home"
    home.mkdir()
    records: list[Record] = []

    @dg.op(out=dg.Out(dg.Nothing))
    def make(context: dg.OpExecutionContext) -> None:
        for number in range(LENGTH):
            record = publish(
                store,
                f"a{number}",
                tuple(records[-1:]),
                files={"data.bin": bytes([number])},
                metrics={"loss": 1.25, "rows": 7},
                dagster_run_id=context.run_id,
            )
            special = {"table": dg.MetadataValue.table([dg.TableRecord({"row": number})])}
            metadata = record_metadata(record, store.directory(record), store, reused=False, special=special)
            tags = {"dagster/data_version": record.digest, "vpmoe/version": record.version}
            key = dg.AssetKey(["smoke", record.asset])
            context.log_event(
                dg.AssetMaterialization(
                    dg.AssetKey(["smoke", "records"]),
                    description=version_name(record),
                    tags={"dagster/data_version": record.record_digest},
                )
            )
            context.log_event(dg.AssetMaterialization(key, metadata=metadata, tags=tags))
            records.append(record)

    @dg.job
    def ladder():
        make()

    with dg.DagsterInstance.local_temp(str(home)) as instance:
        run = ladder.execute_in_process(instance=instance).run_id
    Index(store.root / "index.duckdb").rebuild(store)
    return root, records, run


@pytest.fixture
def told(made, tmp_path, monkeypatch):
    """A copy to tamper with, of events that are no longer on their way."""
    monkeypatch.setattr("vpmoe_assets.events.auditing._UNDER_WAY_S", 0.0)
    root, records, run = made
    shutil.copytree(root / "home", tmp_path / "home")
    return Told(Store(root / "artifacts"), tmp_path / "home", records, run)


def test_events_that_nobody_touched_agree_with_the_records(told):
    assert told.found() == []
    with instance_at(told.home) as instance:
        known = EventAudit(instance, ["smoke"]).sightings("smoke")
    assert {(each.asset, each.record_digest) for each in known} == {
        (each.asset, each.record_digest) for each in told.records
    }


@pytest.mark.parametrize("places", [[OF_RUN], [OF_ALL], [OF_ASSET], [OF_RUN, OF_ALL, OF_ASSET]])
def test_another_data_version(told, places):
    for place in places:
        told.replace(place, told.fifth.digest, "0" * 64)
    found = told.problems()
    assert any(message.startswith(f"rewritten: its digest is {told.fifth.digest}") for message in found)
    assert any("but Dagster knows of 000" in message for message in found)
    assert any("have another metadata digest" in message for message in found) == (len(places) == 1)


@pytest.mark.parametrize("place", [OF_RUN, OF_ALL, OF_ASSET])
@pytest.mark.parametrize(("old", "new"), [("1.25", "0.25"), ('"size_bytes"', '"size"'), ('"page"', '"site"')])
def test_metadata_of_one_copy(told, place, old, new):
    told.replace(place, old, new)
    first, *more = told.problems()
    if old == "1.25":
        assert place in first
        assert first.endswith("has its metadata loss as 0.25, not 1.25")
    assert all(OF_ALL in each and "have another metadata" in each for each in more or [first])


def test_metadata_that_was_altered_in_every_copy(told):
    for place in (OF_RUN, OF_ALL, OF_ASSET):
        told.replace(place, "1.25", "0.25")
    found = told.problems()
    assert len(found) == 3
    assert all(message.endswith("has its metadata loss as 0.25, not 1.25") for message in found)


def test_another_record_digest_also_where_only_the_list_of_records_says_so(told):
    told.replace(OF_ALL, told.fifth.record_digest, "0" * 64)
    assert any(message.startswith("rewritten: its record digest is") for message in told.problems())
    told.replace(OF_ALL, "0" * 64, told.fifth.record_digest)
    with sqlite3.connect(told.home / "history" / "runs" / "index.db") as database:
        sql = "UPDATE event_logs SET event = replace(event, ?, ?) WHERE asset_key LIKE '%records%'"
        database.execute(sql, (told.fifth.record_digest, "0" * 64))
    assert any(message.startswith("rewritten: its record digest is") for message in told.problems())


def test_an_event_that_was_taken_out_of_the_index(told):
    told.delete(OF_ALL)
    message, *more = told.problems()
    assert message.startswith(
        f"the log of run {told.run[:8]} has an event of it that the index over all runs"
    )
    assert "`vpmoe report-events`" in message
    assert more == []


def test_an_event_that_was_taken_out_of_the_log_of_its_run(told):
    told.delete(OF_RUN)
    assert told.problems() == [
        f"the index over all runs has an event of it that the log of run {told.run[:8]} has not"
    ]


def test_a_log_that_is_gone(told):
    (told.home / "history" / "runs" / f"{told.run}.db").unlink()
    found = [each for each in told.found() if each[0] == "problem"]
    assert {asset for _, _, asset, _ in found} == {record.asset for record in told.records}
    assert not (told.home / "history" / "runs" / f"{told.run}.db").exists()


def test_an_asset_that_was_taken_out_of_the_list_of_assets(told):
    told.delete(OF_ASSET)
    assert told.problems() == [
        "what Dagster keeps with the asset is not its newest event in the index over all runs"
    ]


def test_an_event_that_was_taken_out_everywhere_of_a_run_that_ended_well(told):
    for place in (OF_RUN, OF_ALL, OF_ASSET):
        told.delete(place)
    (message,) = told.problems()
    assert message.startswith(f"run {told.run[:8]} made it and ended well, but Dagster has no event of it")


def test_what_was_reported_again_is_known_again(told):
    for place in (OF_RUN, OF_ALL, OF_ASSET):
        told.delete(place)
    with instance_at(told.home) as instance:
        assert report_store(instance, told.store, "smoke").versions == [version_name(told.fifth)]
    assert told.found() == []


def test_what_people_do_in_the_ui_is_a_note(told):
    with instance_at(told.home) as instance:
        instance.wipe_assets([dg.AssetKey(["smoke", told.fifth.asset])])
    ((severity, kind, asset, message),) = told.found()
    assert (severity, kind, asset) == ("note", "event", told.fifth.asset)
    assert message.startswith(f"Dagster's history of {told.fifth.asset} was wiped")
    with instance_at(told.home) as instance:
        instance.delete_run(told.run)
    ((severity, kind, asset, message), *wiped) = reversed(told.found())
    assert (severity, kind, asset) == ("note", "event", "")
    assert "which no run that it knows made" in message
    assert len(wiped) == 1


def test_the_command_asks_the_instance_of_dagster_home(told, monkeypatch):
    told.replace(OF_ALL, "1.25", "0.25")
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(told.store.root))
    monkeypatch.setenv("DAGSTER_HOME", str(told.home))
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    done = CliRunner().invoke(main, ["verify", "--deep", "--without-checks", "--json"])
    assert done.exit_code == 1, done.output
    found = [each for each in json.loads(done.stdout)["problems"] if each["kind"] == "event"]
    assert {each["artifact"] for each in found} == {version_name(told.fifth)}
    assert found[0]["message"].endswith("the index over all runs has its metadata loss as 0.25, not 1.25")
