"""The same training in every parallel layout: data, tensor, expert parallel on two gloo ranks, and alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.trainer.train.train_jobs import make_job, summary, tiny_recipe
from tests.trainer.train.train_work import losses, payload_bytes, run_train, weights
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED

pytestmark = pytest.mark.slow

STEPS = 4
RECIPE = {"steps": STEPS, "training.eval_interval": 2, "training.save_interval": 100}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, conversations) -> Job:
    job = make_job(tmp_path_factory.mktemp("alone"), conversations, recipe=tiny_recipe(**RECIPE))
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    return job


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp": 2}, id="dp2"),
        pytest.param({"dp": 1, "tp": 2}, id="tp2"),
        pytest.param({"dp": 2, "ep": 2}, id="ep2"),
    ],
)
def test_two_ranks_train_as_one_does(layout, tmp_path, conversations, alone):
    """Same initial weights, same batches, same objective: only the order of sums differs."""
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**RECIPE), nproc=2, **layout)
    assert run_ranks(2, run_train, job, True) == [EXIT_DONE] * 2
    assert losses(job) == pytest.approx(losses(alone), rel=2e-5)
    ours, theirs = summary(job), summary(alone)
    assert ours["heldout_loss_end"] == pytest.approx(theirs["heldout_loss_end"], rel=2e-5)
    assert ours["heldout_tokens"] == theirs["heldout_tokens"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["resume_drift"] == 0.0
    for name, value in ours["router"].items():
        assert value == pytest.approx(theirs["router"][name], rel=0.02, abs=0.2), name
    mine, whole = weights(job), weights(alone)
    assert mine.keys() == whole.keys()
    for name, value in mine.items():
        assert value.shape == whole[name].shape, f"{name} is published whole"
        np.testing.assert_allclose(value, whole[name], atol=3e-4, err_msg=name)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2, "ep": 2}], ids=["tp2", "ep2"])
def test_whole_published_weights_load_into_a_split_model(layout, tmp_path, conversations, alone):
    parent = {"vpmoe": Path(alone.output_dir) / "payload"}
    recipe = tiny_recipe(**(RECIPE | {"steps": 1, "init": "checkpoint"}))
    job = make_job(tmp_path, conversations, recipe=recipe, inputs=parent, nproc=2, **layout)
    assert run_ranks(2, run_train, job) == [EXIT_DONE] * 2
    assert summary(job)["heldout_loss_start"] == pytest.approx(summary(alone)["heldout_loss_end"], rel=1e-6)


def test_one_data_parallel_job_gives_the_same_bytes_twice(tmp_path, conversations):
    jobs = [
        make_job(tmp_path, conversations, recipe=tiny_recipe(**RECIPE), nproc=2, dp=2, name=name)
        for name in ("first", "second")
    ]
    for job in jobs:
        assert run_ranks(2, run_train, job) == [EXIT_DONE] * 2
    assert payload_bytes(jobs[0]) == payload_bytes(jobs[1])
    config = json.loads(payload_bytes(jobs[0])["config.json"])
    assert not {"layout", "dp", "created", "host", "path"} & set(config)


def test_a_layout_that_does_not_fit_the_processes_is_refused(tmp_path, conversations):
    job = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_train(job) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert "needs 2 processes and 1 were started" in status


def test_a_failure_of_one_rank_ends_the_other_and_names_the_cause(tmp_path, own_conversations):
    victim = next((own_conversations / "train").glob("*_span.idx"))
    victim.write_bytes(victim.read_bytes()[:-8])
    job = make_job(tmp_path, own_conversations, nproc=2, dp=2)
    assert run_ranks(2, run_train, job) == [EXIT_FAILED] * 2
    assert victim.name in (Path(job.work_dir) / "STATUS").read_text()
