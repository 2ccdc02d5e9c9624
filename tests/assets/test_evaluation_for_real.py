"""Two checkpoints measured by the trainer itself: what it delivers is what the assets take over."""

import json
from pathlib import Path

import pytest

from tests.assets.graphs import SHALLOW, Graph, copy_store, write_experiment
from tests.forks import Forks
from tests.lineage.fabricate import publish
from tests.trainer.surgery.surgery_cases import publish_as
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.status import ATTEMPTS_NAME, LOG_NAME, SUMMARY_NAME
from vpmoe_assets.evaluation.export import export_reports

pytestmark = pytest.mark.slow

FEW = {
    **SHALLOW,
    "ppl_tokens = 2000": "ppl_tokens = 64",
    "prompts = 4, max_new_tokens = 48": "prompts = 1, max_new_tokens = 4",
    "max_per_task = 20": "max_per_task = 6",
}
CHECKPOINTS = ("vpdense_80_healed", "vpmoe")


def test_two_checkpoints_are_measured_published_and_compared(tiny_made, tmp_path: Path, forks: Forks) -> None:
    made, _ = tiny_made
    file = write_experiment(tmp_path / "tiny.toml", FEW)
    graph = Graph(file, copy_store(made.root, tmp_path / "artifacts"))
    experiment = load_experiment(str(file))
    graph.make("core8_bundle")
    for name in CHECKPOINTS:
        rung = name.removesuffix("_healed")
        weights = publish_as(experiment.architecture(rung), tmp_path / name, experiment.rung_dtype(rung))
        files = {path.name: path.read_bytes() for path in weights.iterdir()}
        publish(graph.store, name, experiment="tiny", files=files)
    evals = [f"eval_{name}" for name in CHECKPOINTS]
    with forks.below():
        run = graph.make(*evals)
    assert run.metadata("eval_vpmoe")["compared_to"] == "vpdense_80_healed"
    for asset, name in zip(evals, CHECKPOINTS, strict=True):
        record = graph.latest(asset)
        assert [entry.path for entry in record.files] == [f"{name}.items.jsonl", f"{name}.json"]
        kept = {entry.path for entry in record.run_files}
        assert kept >= {ATTEMPTS_NAME, LOG_NAME, SUMMARY_NAME, f"{name}.json"}
        assert [attempt.ended for attempt in record.attempts] == ["done"]
        assert record.execution["device"] == "cpu"
        assert record.execution["gpus"] == []
        assert {"core8", "ppl"} <= record.execution["seconds"].keys()
        assert {score.object_asset for score in record.evals} == {name}
        for entry in record.files:
            content = (graph.store.payload(record) / entry.path).read_bytes()
            assert b'"tiny"' not in content
            assert str(tmp_path).encode() not in content
    ((first,), (second,)) = graph.index.query(
        "SELECT duration_s FROM runs WHERE asset LIKE 'eval_%' ORDER BY started_utc"
    ).rows
    begun = [graph.latest(asset).started_utc for asset in evals]
    assert begun == sorted(begun)
    assert 0 < first < 300
    assert 0 < second < 300
    work = graph.root / ".work" / "tiny"
    assert [path.name for path in work.iterdir() if path.name.startswith(("eval", ".eval"))] == []
    written = export_reports(graph.store, "tiny", experiment.ladder(), tmp_path / "reports")
    exported = {path.stem: json.loads(path.read_bytes()) for path in written}
    assert exported.keys() == set(CHECKPOINTS)
    student = exported["vpmoe"]
    assert student["config"]["config"] == "tiny"
    assert student["recipe_fingerprint"] == graph.latest("eval_vpmoe").fingerprint
    assert len(student["git_sha"]) == 40
    assert student["delta"]["compared_to"] == "vpdense_80_healed"
    assert student["delta"]["tasks"].keys() == student["results"].keys()
