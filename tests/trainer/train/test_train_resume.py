"""A run that is cut short and goes on equals one that never stopped, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.ranks import Ranks, run_ranks
from tests.trainer.metric_rows import read_metrics
from tests.trainer.train.train_jobs import make_job, summary, tiny_recipe
from tests.trainer.train.train_work import (
    losses,
    payload_bytes,
    run_train,
    train_holding_save,
    train_holding_step,
    train_until,
    wait_for,
    weights,
)
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.job.distributed import session
from trainer.train.engine import Progress, ran_under

pytestmark = pytest.mark.slow

LAST = 8


@pytest.fixture(scope="module")
def straight(tmp_path_factory, conversations) -> Job:
    """A run of 8 steps that nothing disturbed."""
    job = make_job(tmp_path_factory.mktemp("straight"), conversations)
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    return job


def checkpoint(job: Job, step: int) -> Path:
    return Path(job.work_dir) / "checkpoints" / f"iter_{step:07d}"


def tensors(job: Job, step: int) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint, whole: weights, buffers, optimizer state."""
    stored = dist_checkpointing.load_plain_tensors(str(checkpoint(job, step)))
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def assert_same_end(found: Job, expected: Job) -> None:
    """Parameters, optimizer state, sampler, random states and logs of two runs are equal to the bit."""
    with session("cpu"):
        ours, theirs = tensors(found, LAST), tensors(expected, LAST)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    assert any("second_momentum_buffer" in name for name in ours)
    assert any("expert_bias" in name for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    states = [json.loads((checkpoint(job, LAST) / "state.json").read_text()) for job in (found, expected)]
    for name in ("samplers", "schedule", "config_hash", "iteration"):
        assert states[0][name] == states[1][name]
    assert states[0]["progress"]["tokens"] == states[1]["progress"]["tokens"]
    assert states[0]["progress"]["heldout"] == states[1]["progress"]["heldout"]
    randoms = [
        (checkpoint(job, LAST) / "random" / "rank_00000.json").read_text() for job in (found, expected)
    ]
    assert randoms[0] == randoms[1]
    assert payload_bytes(found) == payload_bytes(expected)
    assert losses(found) == losses(expected)


@pytest.mark.parametrize(
    ("where", "step", "resumed_from"),
    [
        pytest.param(train_holding_step, 5, 3, id="between saves"),
        pytest.param(train_holding_save, 3, None, id="inside the first save"),
        pytest.param(train_holding_save, 6, 3, id="inside a later save"),
    ],
)
def test_a_run_killed_with_sigkill_goes_on_bit_for_bit(
    where, step, resumed_from, tmp_path, conversations, straight
):
    job = make_job(tmp_path, conversations)
    said = tmp_path / "there"
    victim = Ranks(1, where, job, step, said)
    wait_for(said)
    victim.kill()
    if where is train_holding_save:
        assert any(name.name.startswith(".saving") for name in checkpoint(job, 0).parent.iterdir())
        assert not checkpoint(job, step).exists()
    assert run_ranks(1, run_train, job) == [EXIT_DONE]
    assert summary(job)["resumed_from"] == resumed_from
    assert_same_end(job, straight)
    left = [path.name for path in checkpoint(job, 0).parent.iterdir()]
    assert not [name for name in left if name.startswith(".")]


def test_a_stopped_run_goes_on_bit_for_bit_whatever_its_experiment_is_called(
    tmp_path, conversations, straight
):
    job = make_job(tmp_path, conversations, experiment="another")
    assert train_until(job, 4) == EXIT_INTERRUPTED
    assert checkpoint(job, 4).is_dir(), "a stop saves the step it stopped at"
    assert run_train(job) == EXIT_DONE
    assert summary(job)["resumed_from"] == 4
    assert_same_end(job, straight)


def test_a_finished_job_started_again_publishes_the_same_and_trains_nothing(
    tmp_path, conversations, straight
):
    job = make_job(tmp_path, conversations)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    assert run_train(job) == EXIT_DONE
    assert summary(job)["resumed_from"] == LAST
    assert payload_bytes(job) == payload_bytes(straight)
    assert summary(job)["tokens"] == summary(straight)["tokens"], "tokens are not counted twice"


def test_another_data_parallel_size_may_take_over_and_hand_back(tmp_path, conversations, straight):
    """DP=2 saves, DP=1 goes on, DP=2 finishes: the state survives each hand-over to the bit, losses agree."""
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    narrow = make_job(tmp_path, conversations)
    assert run_ranks(2, train_until, wide, 3) == [EXIT_INTERRUPTED] * 2
    before = reshard(narrow, 3)
    assert before == 0.0, "what DP=1 loads is what DP=2 saved"
    assert run_ranks(1, train_until, narrow, 5) == [EXIT_INTERRUPTED]
    assert run_ranks(2, reshard, wide, 5) == [0.0, 0.0]
    assert run_ranks(2, run_train, wide) == [EXIT_DONE] * 2
    assert summary(wide)["tokens"] == summary(straight)["tokens"]
    # Two ranks add gradients in another order than one; fp32 round-off is all that may differ.
    assert losses(wide) == pytest.approx(losses(straight), rel=2e-5)
    for name, value in weights(wide).items():
        torch.testing.assert_close(
            torch.from_numpy(value), torch.from_numpy(weights(straight)[name]), atol=2e-4, rtol=2e-4
        )


@pytest.mark.parametrize(
    ("stopped", "resumed"),
    [
        pytest.param(7, 6, id="between the last two steps"),
        pytest.param(8, 6, id="after the last step"),
        pytest.param(6, 6, id="where the check resumes"),
    ],
)
def test_a_data_parallel_size_changed_near_the_end_passes_the_resume_check(
    stopped, resumed, tmp_path, conversations
):
    """Steps run under two layouts differ by round-off; the check repeats them under one and asks for 0."""
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    narrow = make_job(tmp_path, conversations)
    assert run_ranks(2, train_until, wide, stopped) == [EXIT_INTERRUPTED] * 2
    assert run_ranks(1, run_train, narrow, True) == [EXIT_DONE]
    found = summary(narrow)
    assert found["resumed_from"] == resumed
    assert found["resume_drift"] == 0.0
    assert found["resume_check"]["state_equal"]
    assert found["checkpoints"][-2:] == ["iter_0000006", "iter_0000008"]
    said = (Path(narrow.work_dir) / "log.txt").read_text()
    assert ("run under another layout" in said) == (stopped > 6)
    rows = read_metrics(Path(narrow.work_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(LAST + 1)), (
        "a step that was run again stands there once"
    )
    assert found["tokens"]["total"] == rows[-1]["consumed_tokens"]


def test_the_same_layout_goes_on_from_the_newest_step(tmp_path, conversations):
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_ranks(2, train_until, wide, 7) == [EXIT_INTERRUPTED] * 2
    assert run_ranks(2, run_train, wide, True) == [EXIT_DONE] * 2
    assert summary(wide)["resumed_from"] == 7
    assert summary(wide)["resume_drift"] == 0.0


def test_a_layout_between_that_nobody_checked_is_not_forgotten(tmp_path, conversations):
    """DP=1, then DP=2 without the check, then DP=1 with it: the newest checkpoint alone could not tell."""
    narrow = make_job(tmp_path, conversations)
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_ranks(1, train_until, narrow, 6) == [EXIT_INTERRUPTED]
    assert run_ranks(2, train_until, wide, 7, False) == [EXIT_INTERRUPTED] * 2
    assert run_ranks(1, train_until, narrow, 8, False) == [EXIT_INTERRUPTED]
    assert run_ranks(1, run_train, narrow, True) == [EXIT_DONE]
    assert summary(narrow)["resumed_from"] == 6
    assert summary(narrow)["resume_drift"] == 0.0


def test_without_that_rule_the_check_would_find_round_off(tmp_path, conversations, monkeypatch):
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    narrow = make_job(tmp_path, conversations)
    assert run_ranks(2, train_until, wide, 7) == [EXIT_INTERRUPTED] * 2
    monkeypatch.setattr("trainer.train.run.ran_under", lambda *_: True)
    assert run_train(narrow, verify=True) == EXIT_DONE
    assert 0.0 < summary(narrow)["resume_drift"] < 1e-5


def test_which_steps_were_run_under_a_layout():
    one = {"world": 1, "dp": 1, "tp": 1, "ep": 1, "pp": 1, "device": "cpu", "threads": 4}
    two = one | {"world": 2, "dp": 2}
    progress = Progress(tokens={}, absent_spans={}, samples={})
    assert not ran_under(progress.describe(), 0, one), "nothing was run"
    for step, layout in ((0, one), (3, one), (5, two), (7, two)):
        progress.goes_on(step, layout)
    assert progress.layouts == [{"after": 0, **one}, {"after": 5, **two}]
    assert [ran_under(progress.describe(), step, two) for step in (4, 5, 6)] == [False, True, True]
    assert not ran_under(progress.describe(), 6, one)
    assert not ran_under(progress.describe(), 6, two | {"threads": 2}), "sums on a CPU depend on its threads"
    gpu = [{"after": 0, **two, "device": "cuda"}]
    assert ran_under({"layouts": gpu}, 0, two | {"device": "cuda", "threads": 2}), "those on a GPU do not"
    assert not ran_under({"layouts": gpu}, 0, two)


def reshard(job: Job, step: int) -> float:
    """Loads a checkpoint in the present layout and compares what came in with what is stored."""
    from trainer.checkpoints.difference import largest_difference
    from trainer.job.signals import StopRequest
    from trainer.job.workdir import WorkDir
    from trainer.train.run import Run

    with session("cpu", dp=job.execution.dp) as layout:
        run = Run(
            job, job.train_recipe(), WorkDir(Path(job.work_dir), rank=layout.rank), StopRequest(), layout
        )
        engine = run.engine()
        engine.resume(run.checkpoints, step)
        assert engine.iteration == engine.optimizer.steps == step
        return largest_difference(engine.flat_tensors(), run.checkpoints.path(step))


def test_metrics_after_a_crash_hold_every_step_once(tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    shutil.rmtree(checkpoint(job, 8))
    metrics = Path(job.work_dir) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 9, "loss": 1')  # torn by the crash
    assert run_train(job) == EXIT_DONE
    assert [row["step"] for row in read_metrics(metrics)] == list(range(LAST + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"recipe": tiny_recipe(**{"training.optimizer.lr": 1e-3})}, "configuration", id="recipe"
        ),
        pytest.param({"seed": 1235}, "configuration", id="seed"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(change, message, tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations, **change)
    shutil.copytree(Path(straight.work_dir) / "checkpoints", Path(job.work_dir) / "checkpoints")
    assert run_train(job) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert message in status
    state = json.loads((checkpoint(straight, LAST) / "state.json").read_text())
    assert state["config_hash"] in status, "the message names the stored value"
    assert not Path(job.output_dir).exists()


def test_a_checkpoint_of_other_data_is_refused(tmp_path, straight):
    from tests.trainer.train.train_jobs import write_conversations

    job = make_job(tmp_path, write_conversations(tmp_path / "other", seed=1))
    shutil.copytree(Path(straight.work_dir) / "checkpoints", Path(job.work_dir) / "checkpoints")
    assert run_train(job) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    stored = json.loads((checkpoint(straight, LAST) / "state.json").read_text())
    assert stored["samplers"]["synth_kd_v1"]["pack_index_sha256"] in status


def test_tensor_and_expert_parallel_sizes_may_not_change(tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations, nproc=2, dp=2, ep=2)
    shutil.copytree(Path(straight.work_dir) / "checkpoints", Path(job.work_dir) / "checkpoints")
    assert run_ranks(2, run_train, job) == [EXIT_FAILED] * 2
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert "ep = 1" in status
    assert "ep = 2" in status


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path, conversations, straight):
    from trainer.errors import OptimizerStateError
    from trainer.job.signals import StopRequest
    from trainer.job.workdir import WorkDir
    from trainer.train.run import Run

    job = make_job(tmp_path, conversations)
    with session("cpu") as layout:
        run = Run(job, job.train_recipe(), WorkDir(Path(job.work_dir)), StopRequest(), layout)
        engine = run.engine()
        with pytest.raises(OptimizerStateError, match="no optimizer state"):
            engine.optimizer.load_state_dict({})


def test_a_truncated_checkpoint_is_refused_and_the_one_before_serves(tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    shard = next(checkpoint(job, LAST).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run_train(job) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert shard.name in status
    assert "remove this checkpoint" in status
    shutil.rmtree(checkpoint(job, LAST))
    assert run_train(job) == EXIT_DONE
    assert_same_end(job, straight)


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_serves_when_it_is_asked_to(
    tmp_path, conversations, straight
):
    job = make_job(tmp_path, conversations)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    shard = next(checkpoint(job, LAST).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)
    for _ in range(2):
        assert run_train(job) == EXIT_FAILED, "nobody goes back unasked"
        status = (Path(job.work_dir) / "STATUS").read_text()
        assert f"{shard.name} is damaged" in status
        assert f"resume from the one before, {checkpoint(job, 6).name}" in status
        assert not Path(job.output_dir).exists()
    shutil.rmtree(checkpoint(job, LAST))
    assert run_train(job) == EXIT_DONE
    assert summary(job)["resumed_from"] == 6
    assert_same_end(job, straight)


def test_every_rank_checks_a_share_and_all_refuse(tmp_path, conversations):
    wide = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_ranks(2, train_until, wide, 3) == [EXIT_INTERRUPTED] * 2
    shards = sorted(checkpoint(wide, 3).glob("*.distcp"))
    assert len(shards) == 2
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        assert run_ranks(2, run_train, wide) == [EXIT_FAILED] * 2
        assert f"{shard.name} is damaged" in (Path(wide.work_dir) / "STATUS").read_text()
        shard.write_bytes(whole)
    assert run_ranks(2, train_until, wide, 4) == [EXIT_INTERRUPTED] * 2


def test_resume_switched_off_starts_from_the_seed(tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations, resume=False)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    assert run_train(job) == EXIT_DONE
    assert summary(job)["resumed_from"] is None
    assert_same_end(job, straight)


def test_signals_are_named_in_the_reason():
    from trainer.job.signals import StopRequest

    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.received == "SIGTERM"
    assert stop.count == 2


def test_a_run_without_the_resume_check_saves_nothing_for_it(conversations, tmp_path):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**{"training.save_interval": 5}))
    assert run_train(job) == EXIT_DONE
    saved = sorted(path.name for path in checkpoint(job, LAST).parent.glob("iter_*"))
    assert saved == [checkpoint(job, step).name for step in (5, LAST)]


def test_a_resume_check_that_could_not_be_done_is_refused_at_the_start(tmp_path, conversations, straight):
    job = make_job(tmp_path, conversations)
    shutil.copytree(Path(straight.work_dir), Path(job.work_dir))
    shutil.rmtree(checkpoint(job, LAST - 2))
    assert run_train(job, verify=True) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert f"step {LAST - 2}" in status
    assert "--no-verify-resume" in status
    assert run_train(job) == EXIT_DONE
