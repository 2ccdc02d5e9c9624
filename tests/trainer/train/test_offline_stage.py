"""Stage 2: scored and plain conversations by the objective of a teacher, through stops, to its weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.trainer.metric_rows import read_metrics
from tests.trainer.train.stores import TEACHER, identity, write_store
from tests.trainer.train.train_jobs import make_job, summary, tiny_recipe
from tests.trainer.train.train_work import losses, payload_bytes, run_train, train_until
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.train.run import Run

SCORED = {"fraction": 0.7, "subset_fraction": 0.5, "topk": 4, "tail_draws": 2}
KD = {"span_weight_reasoning": 1.0, "span_weight_final": 1.0}
KL = KD | {"kl_weight": 0.5, "target": "mix", "rescored": {"tau": 1.0, "w_min": 0.25, "w_max": 4.0}}


@pytest.fixture(scope="module")
def store(conversations, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("teacher_topk"), conversations)


def recipe(**changes):
    short = {"steps": 4, "training.save_interval": 2, "training.eval_interval": 4}
    return tiny_recipe(**short) | {"objective": "topk_kl", "kd": KL, "scored": SCORED} | changes


def job_of(base, conversations, store, **changes) -> Job:
    return make_job(base, conversations, recipe=recipe(**changes), inputs={"teacher_topk": store})


@pytest.fixture(scope="module")
def straight(conversations, store, tmp_path_factory) -> Job:
    job = job_of(tmp_path_factory.mktemp("straight"), conversations, store)
    assert run_train(job, verify=True) == EXIT_DONE
    return job


def test_a_stage_of_both_kinds_trains_measures_and_repeats_itself_to_the_bit(straight):
    said = summary(straight)
    assert said["resume_drift"] == 0.0
    assert said["resume_check"]["state_equal"]
    assert said["samples"] == {"scored": 11, "conversations": 5}, "0.7 of 16, spread evenly"
    assert set(said["tokens"]) == {"total", "scored_reasoning", "scored_final", "reasoning", "final"}
    assert set(said["heldout"]) == {"scored", "conversations"}
    rows = read_metrics(Path(straight.work_dir) / "metrics.jsonl")
    for row in rows[1:]:
        kinds = [row[f"samples/{kind}"] for kind in ("scored", "conversations")]
        assert sum(kinds) == 4
        assert np.isfinite(row["loss"])
    assert rows[0]["heldout_kl/scored"] > 0
    assert rows[0]["heldout_kl/scored_final"] > 0
    assert rows[0]["heldout_loss/scored"] == pytest.approx(np.log(256), abs=0.5)


def test_a_stopped_stage_goes_on_bit_for_bit_and_its_place_is_the_place_in_the_store(
    tmp_path, conversations, store, straight
):
    job = job_of(tmp_path, conversations, store)
    assert train_until(job, 3) == EXIT_INTERRUPTED
    state = json.loads((Path(job.work_dir) / "checkpoints" / "iter_0000003" / "state.json").read_text())
    assert set(state["samplers"]) == {"scored", "synth_kd_v1"}
    assert (state["samplers"]["scored"]["epoch"], state["samplers"]["scored"]["index"]) == (0, 8)
    assert run_train(job) == EXIT_DONE
    assert summary(job)["resumed_from"] == 3
    assert payload_bytes(job) == payload_bytes(straight)
    assert losses(job) == losses(straight)
    assert summary(job)["heldout"] == summary(straight)["heldout"]


def test_a_run_goes_on_with_the_store_that_it_began_with_and_no_other(tmp_path, conversations, store):
    job = job_of(tmp_path, conversations, store)
    assert train_until(job, 1) == EXIT_INTERRUPTED
    other = write_store(tmp_path / "other", conversations, identity(teacher=TEACHER | {"digest": "e" * 64}))
    again = make_job(tmp_path, conversations, recipe=recipe(), inputs={"teacher_topk": other})
    assert run_train(again) == EXIT_FAILED
    assert "the checkpoint was made with pack index" in (Path(job.work_dir) / "STATUS").read_text()


def test_cross_entropy_weighed_by_the_teacher_is_another_objective_of_the_same_data(
    tmp_path, conversations, store
):
    rescored = {"objective": "rescored_ce", "kd": KD | {"rescored": KL["rescored"]}, "steps": 1}
    job = job_of(tmp_path, conversations, store, **rescored)
    assert run_train(job) == EXIT_DONE
    assert "scored" in summary(job)["heldout"]


def test_the_parent_is_the_checkpoint_that_is_not_the_teacher(tmp_path, conversations):
    for name in ("parent", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    inputs = {"vpmoe_stage1": tmp_path / "parent", "teacher": tmp_path / "teacher"}
    found = SimpleNamespace(job=make_job(tmp_path, conversations, inputs=inputs))
    assert Run.parent(found) == tmp_path / "parent"
    alone = SimpleNamespace(job=make_job(tmp_path, conversations, inputs={"teacher": tmp_path / "teacher"}))
    with pytest.raises(ValueError, match="needs exactly one input with published weights"):
        Run.parent(alone)
