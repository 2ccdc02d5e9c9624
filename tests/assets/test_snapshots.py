"""What a record keeps of the code and the configuration; only the trainer itself is a stand-in."""

import json

import dagster as dg
import pytest

from tests.assets.graphs import Graph, stand_in_trainer
from vpmoe_assets.assets.making import Making
from vpmoe_assets.codebase.snapshot import unpack
from vpmoe_assets.lineage.objects import ObjectStore

INIT = "trainer/model/init.py"


@pytest.fixture
def stage(tiny, project_copy, monkeypatch) -> Graph:
    """The first training stage, to be made from a copy of the project."""
    tiny.resources = {"trainer": stand_in_trainer(monkeypatch, "stand_in_training")}
    return tiny


def objects(graph: Graph) -> ObjectStore:
    return ObjectStore(graph.root)


def test_a_record_names_what_it_takes_to_repeat_it(stage, project_copy):
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    named, kept = record.objects, objects(stage)
    sources = unpack(kept.get(named.sources))
    assert sources[INIT] == (project_copy.root / INIT).read_bytes()
    assert kept.get(named.experiment) == stage.experiment.read_bytes()
    assert kept.get_json(named.resolved_experiment)["stages"]["vpmoe_stage1"]["steps"] == 10
    assert kept.get_json(named.run_config) == {}
    assert {"torch", "dagster"} <= {package["name"] for package in kept.get_json(named.packages)}
    job = json.loads((stage.store.directory(record) / "run" / "job.json").read_bytes())
    assert job["provenance"]["snapshot"] == named.sources
    shared = {name for name in named.model_dump().values() if name}
    assert {path.name for path in kept.directory.iterdir()} >= shared
    laid_out = stage.root / ".work" / ".sources" / named.sources
    assert (laid_out / INIT).read_bytes() == sources[INIT]


def test_a_run_that_died_goes_on_with_equal_code_from_the_sources_of_its_own_start(
    stage, project_copy, monkeypatch
):
    monkeypatch.setenv("STAND_IN", json.dumps({"die_at": 7}))
    assert not stage.run("vpmoe_stage1").success
    (job_file,) = (stage.root / ".work" / "tiny").glob("vpmoe_stage1-*/job.json")
    before = json.loads(job_file.read_bytes())

    text = (project_copy.root / INIT).read_text()
    (project_copy.root / INIT).write_text(text + "# says nothing\n")
    project_copy.read_again()
    monkeypatch.setenv("STAND_IN", "{}")
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    assert record.execution["resumed_from"] == 6
    assert record.fingerprint == before["recipe_fingerprint"]
    after = json.loads((stage.store.directory(record) / "run" / "job.json").read_bytes())
    assert after["provenance"]["snapshot"] == record.objects.sources != before["provenance"]["snapshot"]
    assert [attempt.sources for attempt in record.attempts] == [
        before["provenance"]["snapshot"],
        record.objects.sources,
    ]
    assert b"# says nothing" in unpack(objects(stage).get(record.objects.sources))[INIT]
    assert b"# says nothing" not in unpack(objects(stage).get(before["provenance"]["snapshot"]))[INIT]


def test_a_job_that_was_finished_before_names_the_sources_that_it_ran_from(stage, project_copy, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Making, "publish", full)
        assert not stage.run("vpmoe_stage1").success
    (job_file,) = (stage.root / ".work" / "tiny").glob("vpmoe_stage1-*/job.json")
    ran = json.loads(job_file.read_bytes())["provenance"]["snapshot"]

    text = (project_copy.root / INIT).read_text()
    (project_copy.root / INIT).write_text(text + "# says nothing\n")
    project_copy.read_again()
    run = stage.make("vpmoe_stage1")
    assert "is finished; not run again" in run.log()
    assert stage.latest("vpmoe_stage1").objects.sources == ran
    assert b"# says nothing" not in unpack(objects(stage).get(ran))[INIT]


def test_a_source_file_with_a_secret_in_it_stops_a_run_before_anything_is_made(
    stage, project_copy, monkeypatch
):
    monkeypatch.setenv("HUB_TOKEN", "correct-horse-battery")
    text = (project_copy.root / INIT).read_text()
    (project_copy.root / INIT).write_text("# correct-horse-battery\n" + text)
    project_copy.read_again()
    message = stage.run("vpmoe_stage1").error()
    assert message.startswith(f"vpmoe_stage1: {INIT}, line 1: holds the value of the variable HUB_TOKEN")
    assert stage.store.versions("tiny", "vpmoe_stage1") == []
    assert not list((stage.root / ".work" / "tiny").glob("vpmoe_stage1-*"))
    assert not any(b"correct-horse" in path.read_bytes() for path in stage.root.rglob("*") if path.is_file())


def test_the_run_configuration_is_kept_without_its_secrets(stage):
    definitions = stage.definitions()
    made = [asset for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition)]
    config = {"resources": {"trainer": {"config": {"wandb": "disabled", "poll_s": 0.1}}}}
    with stage.environment():
        result = dg.materialize(
            made,
            selection=[dg.AssetKey(["tiny", "vpmoe_stage1"])],
            resources={**(definitions.resources or {}), **stage.resources},
            run_config=config,
        )
    assert result.success
    assert objects(stage).get_json(stage.latest("vpmoe_stage1").objects.run_config) == config
