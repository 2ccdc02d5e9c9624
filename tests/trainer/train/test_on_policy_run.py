"""On-policy runs: killed at chosen moments they end with the same bits; what cannot run is refused."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import Ranks, run_ranks
from tests.trainer.metric_rows import read_metrics
from tests.trainer.train.on_policy_jobs import (
    STEPS,
    on_policy_job,
    on_policy_recipe,
    write_harmony,
    write_teacher,
)
from tests.trainer.train.train_jobs import summary
from tests.trainer.train.train_work import losses, payload_bytes, run_train, train_holding_save, wait_for
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED
from trainer.data.indexed import SpanDocuments
from trainer.job.distributed import Layout
from trainer.rollouts.answering import Answering
from trainer.rollouts.prompts import PromptWalk
from trainer.rollouts.storage import read_round
from trainer.rollouts.stored import stored_prompts
from trainer.teacher.teacher import Teacher
from trainer.train.on_policy import require_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_harmony(tmp_path_factory.mktemp("synth_kd_v1"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "payload")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, teacher) -> Job:
    """A run that nothing disturbed, and its resume check."""
    job = on_policy_job(tmp_path_factory.mktemp("straight"), data, teacher)
    assert run_ranks(1, run_train, job, True) == [EXIT_DONE]
    return job


def rounds(job: Job) -> dict[str, bytes]:
    """Every file of the run's history of rollouts."""
    directory = Path(job.work_dir) / "rollouts"
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def asked(contents: dict[str, bytes]) -> list[tuple[int, int, int]]:
    """The prompts of a history, in order: epoch, conversation, sample."""
    found: list[tuple[int, int, int]] = []
    for content in contents.values():
        arrays = read_round(content)[1]
        found += zip(*(arrays[name].tolist() for name in ("epochs", "documents", "samples")), strict=True)
    return found


def test_a_resumed_run_equals_the_continued_one_and_the_walk_over_the_prompts_is_whole(straight, data):
    found = summary(straight)
    assert found["resume_drift"] == 0.0
    assert found["resume_check"]["state_equal"]
    assert found["samples"] == {"conversations": STEPS, "rollouts": 3 * STEPS}
    recipe = straight.train_recipe()
    documents = SpanDocuments(data, "train")
    walk = PromptWalk(
        stored_prompts(documents, straight.seed),
        recipe.rollouts.curriculum,
        seed=straight.seed,
        steps=STEPS,
        longest=recipe.seq_len - recipe.rollouts.max_new_tokens,
    )
    wanted = [one for number in range(1, STEPS + 1) for one in walk.take(number, 4)]
    history = rounds(straight)
    assert len(history) == STEPS
    assert asked(history) == [(one.epoch, one.document, one.sample) for one in wanted]
    modes = [
        header["modes"][mode]
        for header, arrays in map(read_round, history.values())
        for mode in arrays["modes"].tolist()
    ]
    assert modes == [one.mode for one in wanted]


def train_holding_answers(job: Job, hold_at: int, said: Path) -> int:
    """Trains until the student is to answer a round, and waits there."""
    answer = Answering.answer

    def held(self, model, requests, number, *rest):
        if number == hold_at:
            said.touch()
            time.sleep(600)
        return answer(self, model, requests, number, *rest)

    Answering.answer = held
    return run_train(job)


def train_holding_scores(job: Job, hold_at: int, said: Path) -> int:
    """Trains with a teacher that never answers to one round, until the run waits for that."""
    score, calls = Teacher.score, []

    def held(self, sequences, wanted, topk, **rest):
        calls.extend([topk] * (len(sequences) == 4 and len(calls) < hold_at))
        if len(calls) == hold_at:
            said.touch()
            time.sleep(600)
        return score(self, sequences, wanted, topk, **rest)

    Teacher.score = held
    return run_train(job)


def test_a_run_killed_while_answering_scoring_and_saving_ends_with_the_same_bits(
    tmp_path, data, teacher, straight
):
    job = on_policy_job(tmp_path, data, teacher)
    for place, (where, at) in enumerate(
        [(train_holding_answers, 5), (train_holding_scores, 5), (train_holding_save, 6)]
    ):
        said = tmp_path / str(place)
        victim = Ranks(1, where, job, at, said)
        wait_for(said)
        if where is train_holding_scores:
            time.sleep(0.3)  # the run goes on until it needs those scores
        victim.kill()
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    assert summary(job)["resumed_from"] == 4
    assert payload_bytes(job) == payload_bytes(straight)
    assert rounds(job) == rounds(straight)
    assert losses(job) == losses(straight)
    kept = ("trained", "dropped_total", "waiting", "valid_rate", "entropy", "staleness/1", "mode/high")
    rows = [read_metrics(Path(one.work_dir) / "metrics.jsonl")[1:] for one in (job, straight)]
    assert [[row[f"rollouts/{name}"] for name in kept] for row in rows[0]] == [
        [row[f"rollouts/{name}"] for name in kept] for row in rows[1]
    ]


def test_ranks_share_the_answers_and_see_the_same_rollouts(tmp_path, data, teacher, straight):
    wide = on_policy_job(tmp_path, data, teacher, nproc=2, dp=2, recipe=on_policy_recipe(steps=3))
    narrow = on_policy_job(tmp_path, data, teacher, name="narrow", recipe=on_policy_recipe(steps=3))
    assert run_ranks(2, run_train, wide) == [EXIT_DONE] * 2
    assert run_ranks(1, run_train, narrow) == [EXIT_DONE]
    assert losses(wide) == pytest.approx(losses(narrow), rel=1e-4)
    for ours, theirs in zip(rounds(wide).values(), rounds(narrow).values(), strict=True):
        (header, mine), (other, its) = read_round(ours), read_round(theirs)
        assert header == other
        assert np.array_equal(mine["ids"], its["ids"])
        assert np.array_equal(mine["documents"], its["documents"])
        np.testing.assert_allclose(mine["teacher_logprob"], its["teacher_logprob"], atol=1e-4)


def test_a_missing_round_of_the_history_is_refused_and_named(tmp_path, data, teacher, straight):
    job = on_policy_job(tmp_path, data, teacher)
    work = Path(shutil.copytree(straight.work_dir, job.work_dir))
    (work / "rollouts" / "round_0000003.safetensors").unlink()
    assert run_train(job) == EXIT_FAILED
    assert "round_0000003.safetensors is missing (1 of the 6 rounds" in (work / "STATUS").read_text()


@pytest.mark.parametrize(
    ("layout", "inputs", "message"),
    [
        pytest.param({}, ("synth_kd_v1",), "inputs: teacher is missing", id="no teacher"),
        pytest.param({}, ("teacher",), "inputs: synth_kd_v1 is missing", id="no conversations"),
        pytest.param({"ep": 2, "world": 2}, ("teacher", "synth_kd_v1"), "set ep = 1", id="spread experts"),
        pytest.param({"tp": 2, "world": 2}, ("teacher", "synth_kd_v1"), "or serve the teacher", id="local"),
    ],
)
def test_what_rollouts_cannot_have_is_refused_with_the_remedy(
    tmp_path, data, teacher, layout, inputs, message
):
    job = on_policy_job(tmp_path, data, teacher)
    given = {name: job.inputs[name] for name in inputs}
    here = {"rank": 0, "world": 1, "tp": 1, "ep": 1, "dp": 1, "device": torch.device("cpu")} | layout
    with pytest.raises(ConfigError, match=message):
        require_inputs(job.model_copy(update={"inputs": given}), Layout(**here))
