"""Against the project's own classes of events, which check what they are given."""

import json
import uuid

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.export.openlineage import events, run_id
from vpmoe_assets.lineage.graph import ancestors
from vpmoe_assets.lineage.store import Store

oracle = pytest.importorskip("openlineage.client.event_v2", reason="openlineage-python is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("events"))
    synth = publish(store, "synth", metrics={"rows": 12})
    record = publish(store, "kd", (synth,), metrics={"loss": 2.5})
    return synth, record, events(ancestors(store, record))


def test_events_are_those_that_the_project_s_own_classes_write(made):
    from openlineage.client import facet_v2
    from openlineage.client.serde import Serde

    known = {
        "version": facet_v2.dataset_version_dataset.DatasetVersionDatasetFacet,
        "outputStatistics": facet_v2.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
        "jobType": facet_v2.job_type_job.JobTypeJobFacet,
    }

    def facets(given):
        made = {}
        for name, fields in given.items():
            own = {key: value for key, value in fields.items() if not key.startswith("_")}
            if name in known:
                made[name] = known[name](**own, producer=fields["_producer"])
            else:
                made[name] = fields
        return made

    def dataset(kind, given):
        more = {key: facets(given[key]) for key in ("outputFacets",) if key in given}
        return kind(given["namespace"], given["name"], facets=facets(given["facets"]), **more)

    def without_nothing(value):
        if isinstance(value, dict):
            kept = {key: without_nothing(each) for key, each in value.items()}
            return {key: each for key, each in kept.items() if each not in (None, {}, [])}
        return [without_nothing(each) for each in value] if isinstance(value, list) else value

    for event in made[2]:
        run, job = event["run"], event["job"]
        theirs = oracle.RunEvent(
            eventType=oracle.RunState[event["eventType"]],
            eventTime=event["eventTime"],
            run=oracle.Run(run["runId"], facets=facets(run["facets"])),
            job=oracle.Job(job["namespace"], job["name"], facets=facets(job["facets"])),
            inputs=[dataset(oracle.InputDataset, each) for each in event["inputs"]],
            outputs=[dataset(oracle.OutputDataset, each) for each in event["outputs"]],
            producer=event["producer"],
        )
        assert without_nothing(json.loads(Serde.to_json(theirs))) == without_nothing(event)


def test_every_record_is_one_run_that_starts_and_ends_with_what_it_used_and_made(made):
    synth, record, told = made
    assert [(e["eventType"], e["job"]["name"]) for e in told] == [
        ("START", "synth"),
        ("COMPLETE", "synth"),
        ("START", "kd"),
        ("COMPLETE", "kd"),
    ]
    end = told[-1]
    assert end["run"]["runId"] == run_id(record.record_digest)
    assert uuid.UUID(end["run"]["runId"]).version == 5
    assert end["eventTime"] == record.finished_utc
    (used,) = end["inputs"]
    (output,) = told[1]["outputs"]
    assert (used["namespace"], used["name"], used["facets"]) == (
        output["namespace"],
        output["name"],
        output["facets"],
    )
    assert used["facets"]["version"]["datasetVersion"] == synth.version
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 12
