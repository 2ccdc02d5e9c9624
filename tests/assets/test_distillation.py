"""The teacher, the store of its scores and what is published of both; only the trainer is a stand-in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.assets.graphs import Graph, Run, copy_store, stand_in_trainer, write_experiment
from vpmoe_assets.checks import distillation
from vpmoe_assets.harmony import topk_audit
from vpmoe_assets.lineage.errors import ArtifactBlocked, EvidenceMissing

PROGRAM = "stand_in_distillation"
CHECKS = {"shards_verify", "bound_to_inputs", "one_record_per_token", "mass_at_most_one", "coverage"}


def ask(monkeypatch: pytest.MonkeyPatch, **what: object) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps(what))


@pytest.fixture(scope="module")
def teacher_made(tiny_made, tmp_path_factory) -> tuple[Graph, Run]:
    """The experiment with its first stage and its teacher made up; nobody may write into it."""
    graph, _ = tiny_made
    root = copy_store(graph.root, tmp_path_factory.mktemp("teacher") / "artifacts")
    with pytest.MonkeyPatch.context() as patch:
        mine = Graph(graph.experiment, root, resources={"trainer": stand_in_trainer(patch, PROGRAM)})
        return mine, mine.make("vpmoe_stage1", "teacher")


@pytest.fixture(scope="module")
def scores_made(teacher_made, tmp_path_factory) -> tuple[Graph, Run]:
    """The same with the scores; nobody may write into it."""
    graph, _ = teacher_made
    root = copy_store(graph.root, tmp_path_factory.mktemp("scores") / "artifacts")
    with pytest.MonkeyPatch.context() as patch:
        mine = Graph(graph.experiment, root, resources={"trainer": stand_in_trainer(patch, PROGRAM)})
        return mine, mine.make("teacher_topk")


@pytest.fixture
def taught(teacher_made, monkeypatch, tmp_path) -> Graph:
    """The experiment with its teacher, in a store of the test's own."""
    graph, _ = teacher_made
    trainer = stand_in_trainer(monkeypatch, PROGRAM)
    return Graph(
        graph.experiment, copy_store(graph.root, tmp_path / "artifacts"), resources={"trainer": trainer}
    )


def test_a_teacher_of_our_own_is_trained_on_and_says_what_it_is(teacher_made):
    taught, run = teacher_made
    record = taught.latest("teacher")
    assert {given.asset for given in record.inputs} == {"vpmoe_stage1", "synth_kd_v1"}
    assert (record.recipe["init"], record.recipe["steps"]) == ("checkpoint", record.metrics["steps"])
    assert run.metadata("teacher")["teacher"].startswith("a stand-in: our own vpmoe_stage1, trained ")
    checks = {name: (found.passed, found.blocking) for name, found in run.checks("teacher").items()}
    assert checks["token_id_space"] == (True, True)
    assert all(passed for passed, _ in checks.values())


def test_scores_are_published_with_their_size_their_teacher_and_their_mass(scores_made):
    taught, run = scores_made
    record = taught.latest("teacher_topk")
    assert {given.asset for given in record.inputs} == {"teacher", "synth_kd_v1"}
    assert record.metrics["bytes_per_token"] == record.metrics["bytes"] / record.metrics["tokens"] > 0
    assert record.details["teacher"]["digest"] == taught.latest("teacher").digest
    shown = run.metadata("teacher_topk")
    assert shown["reasoning_mode"] == "high"
    assert shown["kept_mass"].startswith("![mass of the kept ids](data:image/png;base64,")
    checks = run.checks("teacher_topk")
    assert {name for name, found in checks.items() if found.passed and found.blocking} == CHECKS
    assert checks["one_record_per_token"].metadata["tokens"].value == record.metrics["tokens"]


def test_workers_share_the_shards_and_make_the_same_store(scores_made, taught, monkeypatch):
    alone = scores_made[0].latest("teacher_topk")
    shared = replace(taught, resources={"trainer": stand_in_trainer(monkeypatch, PROGRAM, score_workers=2)})
    ask(monkeypatch, die_at=1)
    failed = shared.run("teacher_topk")
    assert (
        "teacher_topk: worker 1 of 2: ended with exit code 9. What it has finished is kept" in failed.error()
    )
    assert shared.store.assets("tiny").count("teacher_topk") == 0
    ask(monkeypatch)
    shared.make("teacher_topk")
    record = shared.latest("teacher_topk")
    assert record.digest == alone.digest
    assert (alone.execution["score_workers"], record.execution["score_workers"]) == (1, 2)
    run = shared.store.directory(record) / "run"
    lines = {tuple(line.split()) for line in (run / "log.txt").read_text().splitlines()}
    assert {("train", "0", "by", "0"), ("train", "1", "by", "1"), ("train", "1", "by", "all")} <= lines
    assert not {("train", "1", "by", "0"), ("train", "0", "by", "1")} & lines
    assert [attempt.ended.partition(":")[0] for attempt in record.attempts] == ["failed", "done", "done"]
    assert sorted(path.name for path in (run / "workers").iterdir()) == ["0", "1"]
    assert not list((run / "workers").glob("*/heartbeat"))


@pytest.mark.parametrize(
    ("asked", "check", "words"),
    [
        ({"shift": 1}, "one_record_per_token", "the label's log-prob is not that of its id"),
        ({"skip": 3}, "coverage", "is to be scored and is not in the store"),
    ],
)
def test_scores_of_other_tokens_and_scores_that_are_not_there_are_found(
    taught, monkeypatch, asked, check, words
):
    ask(monkeypatch, **asked)
    run = taught.run("teacher_topk")
    assert not run.success
    shown = run.checks("teacher_topk")
    assert [name for name, found in shown.items() if not found.passed] == [check]
    assert words in shown[check].description
    with pytest.raises(ArtifactBlocked, match=check):
        taught.store.require("tiny", "teacher_topk")


def test_a_store_of_another_data_set_or_with_a_flipped_bit_is_found(scores_made, tmp_path):
    made, _ = scores_made
    published = made.store.directory(made.latest("teacher_topk")) / "payload"
    payload = Path(shutil.copytree(published, tmp_path / "payload"))
    assert not topk_audit.bound_to(payload, dataset_digest="0" * 64).passed
    assert not topk_audit.bound_to(payload, teacher={"digest": "0" * 64}).passed
    shard = payload / "train" / "shard_00.topk"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.chmod(0o644)
    shard.write_bytes(content)
    found = topk_audit.shards_verify(payload)
    assert not found.passed
    assert "shard_00" in found.description


ROLLOUTS = {
    "rollouts/teacher_gap/rollout_reasoning": -0.5,
    "rollouts/valid_rate": 0.25,
    "rollouts/end_rate": 0.5,
    "rollouts/length": 40.0,
    "rollouts/trained": 8,
    "rollouts/staleness/0": 0,
    "rollouts/staleness/1": 8,
    "rollouts/dropped": 0,
    "rollouts/dropped_total": 2,
}


def test_the_later_stages_are_made_of_the_ones_before_and_the_teachers_word(
    scores_made, monkeypatch, tmp_path
):
    graph, _ = scores_made
    trainer = stand_in_trainer(monkeypatch, PROGRAM)
    mine = Graph(graph.experiment, copy_store(graph.root, tmp_path / "store"), resources={"trainer": trainer})
    ask(monkeypatch, logged={"kl/scored_reasoning": 1.25, "heldout_kl/scored": 1.5})
    run = mine.make("vpmoe_stage2")
    second = mine.latest("vpmoe_stage2")
    assert {given.asset for given in second.inputs} == {"vpmoe_stage1", "synth_kd_v1", "teacher_topk"}
    assert second.metrics["heldout_kl_scored"] == 1.5
    assert run.metadata("vpmoe_stage2")["distillation"].startswith("![measured over steps]")
    assert all(found.passed for found in run.checks("vpmoe_stage2").values())
    ask(monkeypatch, logged=ROLLOUTS)
    run = mine.make("vpmoe_stage3")
    third = mine.latest("vpmoe_stage3")
    assert {given.asset for given in third.inputs} == {"vpmoe_stage2", "synth_kd_v1", "teacher"}
    shown, checks = run.metadata("vpmoe_stage3"), run.checks("vpmoe_stage3")
    assert (third.metrics["rollouts_valid_rate"], third.metrics["rollouts_dropped_total"]) == (0.25, 2)
    assert shown["distillation"].startswith("![measured over steps]")
    assert shown["staleness"].startswith("![staleness of the rollouts]")
    assert all(found.passed for found in checks.values())
    assert {"harmony_validity", "buffer_health", "resume_drift", "router_alive"} <= checks.keys()
    found = {name: value.value for name, value in checks["buffer_health"].metadata.items()}
    trained = 8 * third.metrics["steps"]
    assert found.items() >= {"trained": trained, "dropped": 2, "dry_steps": 0, "mean_staleness": 1.0}.items()


def points(**last: float) -> list[dict[str, float]]:
    """What eight steps logged, the last two with some other values."""
    return [{"step": step, **ROLLOUTS, **(last if step > 6 else {})} for step in range(1, 9)]


@pytest.mark.parametrize(
    ("logged", "check", "passed", "words"),
    [
        (
            points(),
            "harmony_validity",
            True,
            "25.0% of the answers are valid at the beginning, 25.0% at the end",
        ),
        (points(**{"rollouts/valid_rate": 0.21}), "harmony_validity", True, "21.0% at the end"),
        (points(**{"rollouts/valid_rate": 0.1}), "harmony_validity", False, "10.0% at the end"),
        (points(), "buffer_health", True, "64 rollouts trained on, 2 dropped, 1.00 steps old"),
        (points(**{"rollouts/trained": 0}), "buffer_health", False, "steps 7, 8 had no rollout to train on"),
        (points(**{"rollouts/dropped_total": 16}), "buffer_health", False, "16 of 80 rollouts grew too old"),
    ],
)
def test_a_lost_format_dry_steps_and_dropped_rollouts_warn(logged, check, passed, words):
    found = getattr(distillation, check)
    verdict = found.run(SimpleNamespace(points=logged), {})
    assert (verdict.passed, found.blocking) == (passed, False)
    assert words in verdict.description


def test_of_a_run_that_went_on_from_a_checkpoint_every_step_counts_once():
    twice = points() + points(**{"rollouts/valid_rate": 0.5})
    verdict = distillation.buffer_health.run(SimpleNamespace(points=twice), {})
    assert verdict.metadata["trained"] == 64


def test_without_a_word_on_rollouts_nothing_is_known():
    with pytest.raises(EvidenceMissing, match="nothing was logged of rollouts"):
        distillation.buffer_health.run(SimpleNamespace(points=[{"step": 1, "loss": 2.0}]), {})


OURS = """kind = "artifact"                        # a stand-in: our own stage 1, trained longer
asset = "vpmoe_stage1"
extra_steps = 8
"""
SERVED = """kind = "server"
model = "gpt-oss"
revision = "0123456789abcdef0123456789abcdef01234567"
url_env = "MY_TEACHER"
"""


def test_a_served_teacher_is_who_answers_and_its_scores_need_to_know_where(tiny, monkeypatch, tmp_path):
    monkeypatch.delenv("MY_TEACHER", raising=False)
    toml = write_experiment(tmp_path / "served.toml", {OURS: SERVED, "tail_draws = 8\n": ""})
    served = Graph(toml, tiny.root, resources={"trainer": stand_in_trainer(monkeypatch, PROGRAM)})
    run = served.make("teacher")
    record = served.latest("teacher")
    assert [entry.path for entry in record.files] == ["teacher.json"]
    assert "url_env" not in record.recipe, "where it is, is no part of what it is"
    assert "MY_TEACHER" not in (served.store.directory(record) / "payload" / "teacher.json").read_text()
    assert run.metadata("teacher")["teacher"] == f"gpt-oss at {record.recipe['revision']}, served"
    checks = run.checks("teacher")
    assert checks["token_id_space"].passed
    assert not checks["reachable"].passed
    assert "MY_TEACHER is not set, so nobody could be asked" in checks["reachable"].description
    failed = served.run("teacher_topk")
    assert failed.error().startswith(
        "teacher_topk: sources.teacher.url_env: the environment variable MY_TEACHER is not set"
    )
