"""Healing runs: text and conversations mixed, new layers first, from a published parent, on dense rungs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.numpy import load_file

from tests.ranks import Ranks, run_ranks
from tests.trainer.metric_rows import read_metrics
from tests.trainer.train.healing_jobs import (
    LAYERS,
    NEW_LAYERS,
    PARENT_LAYERS,
    PHASE,
    STEPS,
    healing_job,
    healing_recipe,
    write_text,
)
from tests.trainer.train.train_jobs import summary
from tests.trainer.train.train_work import (
    losses,
    payload_bytes,
    run_train,
    train_holding_step,
    train_until,
    wait_for,
    weights,
)
from trainer.checkpoints.published import save_published
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.job.distributed import session
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.train.run import Run

pytestmark = pytest.mark.slow

NEW = tuple(f"decoder.layers.{number - 1}." for number in NEW_LAYERS)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mock healing text that no test may write to."""
    return write_text(tmp_path_factory.mktemp("healing_text_v1"))


@pytest.fixture(scope="module")
def job_of(conversations, text):
    """Makes a healing job below a directory."""

    def make(base, rung="vpdense_80", *, changes=None, **options) -> Job:
        return healing_job(base, conversations, text, healing_recipe(rung, **(changes or {})), **options)

    return make


@pytest.fixture(scope="module")
def straight(tmp_path_factory, job_of) -> Job:
    """Both phases of a deep rung's healing, with nothing in between, and with the resume check."""
    job = job_of(tmp_path_factory.mktemp("straight"))
    assert run_ranks(1, run_train, job, True) == [EXIT_DONE]
    return job


def status(job: Job) -> str:
    return (Path(job.work_dir) / "STATUS").read_text().strip()


def rows(job: Job) -> list[dict]:
    return read_metrics(Path(job.work_dir) / "metrics.jsonl")


def checkpoint(job: Job, step: int) -> Path:
    return Path(job.work_dir) / "checkpoints" / f"iter_{step:07d}"


def tensors(job: Job, step: int) -> dict[str, torch.Tensor]:
    """Every stored tensor of a resume checkpoint, whole."""
    with session("cpu"):
        stored = dist_checkpointing.load_plain_tensors(str(checkpoint(job, step)))
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def parameters(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in stored.items() if not name.startswith("optimizer.")}


def initial(job: Job, directory: Path) -> dict[str, np.ndarray]:
    """The weights that a job's seed gives, published."""
    with session("cpu") as layout:
        run = Run(job, job.train_recipe(), WorkDir(directory / "work"), StopRequest(), layout)
        save_published(run.engine().model, job.train_recipe().architecture, directory / "payload")
    return {
        name: value
        for file in (directory / "payload").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def is_new(name: str) -> bool:
    return any(layer in name for layer in NEW)


# ---------------------------------------------------------------- phases


def test_new_layers_train_alone_first_and_all_train_afterwards(straight, tmp_path):
    before = {name: torch.from_numpy(value) for name, value in initial(straight, tmp_path).items()}
    border, last = tensors(straight, PHASE), tensors(straight, STEPS)
    kept = {name for name, value in parameters(border).items() if torch.equal(value, before[name])}
    assert kept == {name for name in before if not is_new(name)}, "bit for bit what they were"
    for name, value in border.items():
        if name.startswith("optimizer."):
            assert bool(value.any()) == is_new(name), f"{name}: moments only of what trains"
    unchanged = {name for name, value in parameters(last).items() if torch.equal(value, border[name])}
    assert not unchanged, "all of them train in the second phase"
    phases = [row["new_layers_only"] for row in rows(straight)[1:]]
    assert phases == [step <= PHASE for step in range(1, STEPS + 1)]
    assert summary(straight)["new_layers_only_steps"] == PHASE


def test_layers_that_thaw_warm_up_once_more(tmp_path, job_of):
    """AdamW's first two updates of fresh averages are at most 1.001 times the rate (by Cauchy-Schwarz)."""
    job = job_of(tmp_path, changes={"training.schedule.min_warmup_limit": 0.75})
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    logged = rows(job)[1:]
    factors = [row["lr/thaw_fraction"] for row in logged]
    assert factors == pytest.approx([1.0] * PHASE + [1 / 3, 2 / 3, 1.0, 1.0])
    rates = [row["lr/vectors"] * row["lr/thaw_fraction"] for row in logged[PHASE : PHASE + 2]]
    border, after = tensors(job, PHASE), tensors(job, PHASE + 2)
    vectors = [name for name in parameters(border) if name.endswith("input_layernorm.weight")]
    moved = {name: float((after[name] - border[name]).abs().max()) for name in vectors}
    old = [value for name, value in moved.items() if not is_new(name)]
    assert len(old) == PARENT_LAYERS
    assert all(0.3 * sum(rates) < value < 1.002 * sum(rates) for value in old)
    assert max(value for name, value in moved.items() if is_new(name)) > 1.002 * sum(rates)


def test_the_resume_check_of_a_mixed_run_finds_no_drift(straight):
    found = summary(straight)
    assert found["resume_drift"] == 0.0
    assert found["resume_check"]["state_equal"]


@pytest.mark.parametrize(
    ("step", "resumed_from"),
    [
        pytest.param(3, 2, id="in the first phase"),
        pytest.param(PHASE + 1, PHASE, id="behind the border"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit_on_either_side_of_the_border(
    step, resumed_from, tmp_path, job_of, straight
):
    job = job_of(tmp_path)
    said = tmp_path / "there"
    victim = Ranks(1, train_holding_step, job, step, said)
    wait_for(said)
    victim.kill()
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    assert summary(job)["resumed_from"] == resumed_from
    assert_same_end(job, straight)


def test_a_run_stopped_at_the_border_goes_on_bit_for_bit(tmp_path, job_of, straight):
    job = job_of(tmp_path)
    assert run_ranks(1, train_until, job, PHASE) == [EXIT_INTERRUPTED]
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    assert summary(job)["resumed_from"] == PHASE
    assert_same_end(job, straight)


def assert_same_end(found: Job, expected: Job) -> None:
    """Weights, moments, places in both data sets, random states and logs are equal to the bit."""
    ours, theirs = tensors(found, STEPS), tensors(expected, STEPS)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    states = [json.loads((checkpoint(job, STEPS) / "state.json").read_text()) for job in (found, expected)]
    assert set(states[0]["samplers"]) == {"synth_kd_v1", "healing_text_v1"}
    for state in states:
        state["progress"].pop("train_seconds")
        for name in ("files", "layout", "sha256"):
            state.pop(name)
    assert states[0] == states[1]
    randoms = [(checkpoint(job, STEPS) / "random/rank_00000.json").read_text() for job in (found, expected)]
    assert randoms[0] == randoms[1]
    assert payload_bytes(found) == payload_bytes(expected)
    assert losses(found) == losses(expected)


def test_two_ranks_heal_as_one_does_and_rest_the_same_layers(tmp_path, job_of, straight):
    job = job_of(tmp_path, nproc=2, dp=2)
    assert run_ranks(2, run_train, job, True) == [EXIT_DONE] * 2
    assert losses(job) == pytest.approx(losses(straight), rel=2e-5)
    ours, theirs = summary(job), summary(straight)
    assert ours["resume_drift"] == 0.0
    for name in ("tokens", "samples", "heldout_tokens"):
        assert ours[name] == theirs[name], name
    for part, course in ours["heldout"].items():
        assert course == pytest.approx(theirs["heldout"][part], rel=2e-5)
    for name, value in weights(job).items():
        np.testing.assert_allclose(value, weights(straight)[name], atol=3e-4, err_msg=name)
    border, same = tensors(job, PHASE), tensors(straight, PHASE)
    assert not [
        name for name in parameters(border) if not is_new(name) and not border[name].equal(same[name])
    ]
    state, other = (json.loads((checkpoint(j, STEPS) / "state.json").read_text()) for j in (job, straight))
    assert state["samplers"] == other["samplers"], "the place in the data knows nothing of ranks"


# ---------------------------------------------------------------- mixture


def test_samples_are_mixed_by_the_share_and_each_kind_is_reported(straight):
    found = summary(straight)
    assert found["samples"] == {"conversations": 13, "text": 19}, "0.4 of 32"
    logged = rows(straight)[1:]
    assert sum(row["samples/text"] for row in logged) == 19
    for row in logged:
        share = row["samples/text"] / 4
        assert row["weight/text"] == pytest.approx(share)
        assert row["weight/reasoning"] + row["weight/final"] == pytest.approx(1 - share)
        pooled = sum(row[f"tokens/{s}"] * row[f"loss/{s}"] for s in ("reasoning", "final"))
        pooled /= row["tokens/reasoning"] + row["tokens/final"]
        assert row["loss"] == pytest.approx(share * row["loss/text"] + (1 - share) * pooled)
        assert [row[f"absent/{span}"] for span in ("reasoning", "final", "text")] == [0, 0, 0]


def test_held_out_losses_of_both_kinds_and_their_weighted_mean_are_reported(straight):
    found = summary(straight)
    measured = [row for row in rows(straight) if "heldout_loss" in row]
    assert [row["step"] for row in measured] == [0, 4, 8]
    for row in measured:
        both = 0.4 * row["heldout_loss/conversations"] + 0.6 * row["heldout_loss/text"]
        assert row["heldout_loss"] == pytest.approx(both)
        # Without a kd table conversations are one pool of tokens, in training and here.
        assert row["heldout_objective"] == pytest.approx(both, rel=1e-12)
        assert row["heldout_tokens"] == row["heldout_tokens/text"] + row["heldout_tokens/conversations"]
    for part in ("text", "conversations"):
        course = [row[f"heldout_loss/{part}"] for row in measured]
        tokens = measured[0][f"heldout_tokens/{part}"]
        expected = {"start": course[0], "end": course[-1], "highest": max(course), "tokens": tokens}
        assert found["heldout"][part] == expected
        assert course[-1] < course[0] < 7
    assert found["heldout_loss_start"] == measured[0]["heldout_loss"]
    assert found["heldout_loss_end"] == measured[-1]["heldout_loss"]


def test_a_dense_model_reports_nothing_of_routers(straight):
    assert "router" not in summary(straight)
    assert not [
        name for row in rows(straight) for name in row if name.startswith("moe/") or name == "aux_loss"
    ]


def test_micro_batches_of_any_size_train_the_same(tmp_path, job_of, straight):
    """Text and conversations then share a forward pass; only the order of sums changes."""
    for size in (2, 4):
        changes = {"training.micro_batch_size": size, "training.save_interval": 100}
        job = job_of(tmp_path, changes=changes, name=f"micro{size}")
        assert run_train(job) == EXIT_DONE
        assert losses(job) == pytest.approx(losses(straight), rel=2e-5)
        assert summary(job)["samples"] == summary(straight)["samples"]


def test_text_alone_needs_no_conversations(tmp_path, job_of):
    job = job_of(tmp_path, "vpdense_28", changes={"harmony_fraction": 0.0, "steps": 3})
    del job.inputs["synth_kd_v1"]
    assert run_train(job) == EXIT_DONE
    assert set(summary(job)["heldout"]) == {"text"}
    assert summary(job)["heldout_loss_end"] == summary(job)["heldout"]["text"]["end"]
    assert summary(job)["fill_ratio"] == 1.0


def test_a_mixture_without_its_text_is_refused(tmp_path, job_of):
    job = job_of(tmp_path)
    del job.inputs["healing_text_v1"]
    assert run_train(job) == EXIT_FAILED
    assert "healing_text_v1 is missing" in status(job)
    assert "harmony_fraction = 0.4" in status(job)


def test_data_of_two_tokenizers_are_refused(tmp_path, conversations):
    other = write_text(tmp_path / "text", sha256="e" * 64)
    job = healing_job(tmp_path, conversations, other, healing_recipe())
    assert run_train(job) == EXIT_FAILED
    assert "different ranks" in status(job)
    assert "e" * 64 in status(job)


def test_a_checkpoint_of_other_text_is_refused(tmp_path, conversations, job_of):
    job = job_of(tmp_path)
    assert train_until(job, 2) == EXIT_INTERRUPTED
    changed = healing_job(tmp_path, conversations, write_text(tmp_path / "other", seed=1), healing_recipe())
    assert changed.work_dir == job.work_dir
    assert run_train(changed) == EXIT_FAILED
    assert "pack index" in status(changed)


# ---------------------------------------------------------------- rungs


@pytest.mark.parametrize("rung", ["vpdense0_5_28", "vpdense_28"])
def test_a_dense_rung_heals_from_its_published_parent(rung, tmp_path, job_of):
    """The donor's attention (softmax, rotary, no window) as well as the student's."""
    parent = job_of(tmp_path, rung, changes={"steps": 2, "training.schedule.kind": "constant"}, name="parent")
    assert run_train(parent) == EXIT_DONE
    payload = Path(parent.output_dir) / "payload"
    job = job_of(tmp_path, rung, changes={"init": "checkpoint"}, inputs={rung: payload})
    with session("cpu") as layout:
        run = Run(job, job.train_recipe(), WorkDir(tmp_path / "look"), StopRequest(), layout)
        model = run.start().model
        loaded = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
    published = weights(parent)
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(published)
    assert any("value_residual_logit" in name for name in published) == (rung == "vpdense_28")
    assert any("softmax_offset" in name for name in published) == (rung == "vpdense_28")
    for name, value in published.items():
        assert torch.equal(loaded[name], torch.from_numpy(value)), name
    assert run_train(job) == EXIT_DONE
    found, theirs = summary(job), summary(parent)
    assert found["heldout_loss_start"] == pytest.approx(theirs["heldout_loss_end"], abs=1e-6)
    for course in found["heldout"].values():
        assert course["end"] < course["start"]
    assert "router" not in found
    trained = weights(job)
    assert not [name for name in trained if np.array_equal(trained[name], published[name])]


def test_layers_of_a_mixture_of_experts_cannot_rest(tmp_path, conversations, text):
    from tests.trainer.train.train_jobs import tiny_recipe

    recipe = tiny_recipe(new_layers_only_steps=2, new_layers=[3, 4])
    job = healing_job(tmp_path, conversations, text, recipe)
    assert run_train(job) == EXIT_FAILED
    assert "new_layers_only_steps = 2: in a model with experts" in status(job)


def test_new_layers_that_the_model_lacks_are_refused(tmp_path, job_of):
    job = job_of(tmp_path, changes={"new_layers": [5, LAYERS + 1]})
    assert run_train(job) == EXIT_FAILED
    assert f"num_layers = {LAYERS}" in status(job)
