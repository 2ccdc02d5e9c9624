"""One whole run: what it leaves behind, and how it ends when something goes wrong or it is asked to stop."""

import ast
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import Ranks, run_ranks
from tests.trainer.metric_rows import read_metrics
from tests.trainer.train.train_jobs import make_job, run_job_process, summary, tiny_recipe
from tests.trainer.train.train_work import losses, run_train, train_slow_saves, train_until, wait_for
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.job.distributed import session
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.train.drift import resume_drift
from trainer.train.engine import Engine
from trainer.train.run import Run
from vpmoe_assets.donors.audit import rung_config_faults, rung_tensors, tensor_faults

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, conversations) -> Job:
    """A job run as a user runs it, with tracking, per-layer metrics and the resume check."""
    job = make_job(
        tmp_path_factory.mktemp("finished"), conversations, wandb="offline", per_layer_router_metrics=True
    )
    done = run_job_process(job)
    assert done.returncode == EXIT_DONE, done.stderr
    return job


def status(job: Job) -> str:
    return (Path(job.work_dir) / "STATUS").read_text().strip()


def test_a_finished_job_leaves_payload_summary_and_status(finished):
    assert status(finished) == "done"
    assert sorted(path.name for path in Path(finished.output_dir).iterdir()) == [
        "modules.json",
        "payload",
        "summary.json",
    ]
    found = summary(finished)
    assert found["schema"] == "vpmoe.summary/1"
    assert found["steps"] == 8
    assert found["payload"] == sorted(path.name for path in (Path(finished.output_dir) / "payload").iterdir())
    assert found["checkpoints"] == ["iter_0000003", "iter_0000006", "iter_0000008"]
    assert found["uniform_loss"] == pytest.approx(math.log(256))
    assert found["heldout_loss_end"] < found["heldout_loss_start"] - 0.2
    assert 0 < found["fill_ratio"] <= 1
    assert found["tokens"]["total"] > found["tokens"]["reasoning"] + found["tokens"]["final"] > 0
    payload = Path(finished.output_dir) / "payload"
    config = json.loads((payload / "config.json").read_text())
    assert config["parameters"] == found["parameters"]
    recipe = finished.train_recipe()
    expected = rung_tensors(recipe.architecture, recipe.training.dtype)
    assert tensor_faults(payload, expected) == []
    assert rung_config_faults(payload, recipe.architecture, recipe.training.dtype) == []


def test_the_last_two_steps_repeat_bit_for_bit_from_their_checkpoint(finished):
    found = summary(finished)
    assert found["resume_drift"] == 0.0
    assert found["resume_check"] == {
        "resumed_from": 6,
        "compared_at": 8,
        "max_abs_difference": 0.0,
        "state_equal": True,
    }


def test_every_step_logs_spans_rates_and_router_health(finished):
    rows = read_metrics(Path(finished.work_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert set(rows[0]) == {
        "step",
        "heldout_loss",
        "heldout_objective",
        "heldout_tokens",
        "heldout_loss/reasoning",
        "heldout_loss/final",
        "heldout_loss/conversations",
        "heldout_tokens/conversations",
    }
    for row in rows[1:]:
        for span in ("reasoning", "final"):
            assert row[f"tokens/{span}"] > 0
            assert row[f"weight/{span}"] == 1.0
        assert row["loss"] == pytest.approx(row["loss/reasoning"] + row["loss/final"])
        assert {"lr/matrices", "lr/embeddings", "lr/vectors", "grad_norm", "aux_loss"} <= set(row)
        assert row["tokens_per_second"] > 0
        assert row["step_ms"] > 0
        assert row["moe/router_agg/expert_bias_range"] == pytest.approx(
            0.002 * row["step"], abs=0.002 * row["step"]
        )
        assert all(f"moe/router/layer_{layer}/cv_pct" in row for layer in (2, 3, 4))
        assert "moe/router/layer_1/cv_pct" not in row, "the first layer is dense"
    consumed = [row["consumed_tokens"] for row in rows[1:]]
    assert consumed == sorted(consumed)
    assert consumed[-1] == summary(finished)["tokens"]["total"]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 4, 8]


def test_the_held_out_objective_is_the_training_objective_on_held_out_tokens(finished):
    rows = read_metrics(Path(finished.work_dir) / "metrics.jsonl")
    measured = [row for row in rows if "heldout_loss" in row]
    for row in measured:
        both = row["heldout_loss/reasoning"] + row["heldout_loss/final"]  # both weights are 1 in smoke
        assert row["heldout_objective"] == pytest.approx(both, rel=1e-12)
        assert row["heldout_objective"] > 1.5 * row["heldout_loss"], "a sum of two means, not a mean"
    assert summary(finished)["heldout_objective_start"] == measured[0]["heldout_objective"]
    assert summary(finished)["heldout_objective_end"] == measured[-1]["heldout_objective"]
    assert rows[1]["loss"] == pytest.approx(measured[0]["heldout_objective"], rel=0.02), "now comparable"


def test_the_balancing_loss_is_logged_without_its_coefficient_as_a_mean_over_layers(finished):
    rows = read_metrics(Path(finished.work_dir) / "metrics.jsonl")
    assert all(0.9 < row["aux_loss"] < 2.0 for row in rows[1:])


@pytest.mark.parametrize("coefficient", [1e-4, 0.3])
def test_the_balancing_metric_is_the_layers_own_loss_whatever_the_coefficient(
    coefficient, tmp_path, conversations, monkeypatch
):
    from trainer.model import router

    monkeypatch.setattr(router, "sequence_aux_loss", lambda scores, topk, valid: 1.25 + 0.0 * scores.sum())
    job = make_job(
        tmp_path, conversations, recipe=tiny_recipe(**{"architecture.moe.aux_loss_coeff": coefficient})
    )
    with session("cpu") as layout:
        engine = Run(job, job.train_recipe(), WorkDir(Path(job.work_dir)), StopRequest(), layout).engine()
        assert engine.step().metrics["aux_loss"] == pytest.approx(1.25, rel=1e-6)


def test_without_a_coefficient_there_is_no_balancing_loss_to_log(tmp_path, conversations):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**{"architecture.moe.aux_loss_coeff": 0.0}))
    with session("cpu") as layout:
        engine = Run(job, job.train_recipe(), WorkDir(Path(job.work_dir)), StopRequest(), layout).engine()
        assert "aux_loss" not in engine.step().metrics


def test_tracking_is_offline_and_inside_the_work_directory(finished):
    runs = list((Path(finished.work_dir) / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert not (ROOT / "wandb").exists()


def test_plain_lines_where_there_is_no_terminal(finished):
    log = (Path(finished.work_dir) / "log.txt").read_text()
    assert "step 8/8 loss" in log
    assert "\r" not in log


def test_provenance_beside_every_checkpoint_is_complete(finished):
    for step in (3, 6, 8):
        found = json.loads(
            (Path(finished.work_dir) / "checkpoints" / f"iter_{step:07d}" / "provenance.json").read_text()
        )
        assert found["code"] == {
            "git_sha": "a" * 40,
            "git_dirty": False,
            "source_digest": "b" * 64,
            "lock_digest": "c" * 64,
            "snapshot": None,
        }
        assert found["config"]["steps"] == 8
        assert found["config_sha256"] == summary(finished)["config_sha256"]
        assert found["tokenizer"]["model_sha256"]
        data = found["datasets"]["synth_kd_v1"]
        assert data["digest"] == "d" * 64
        assert len(data["manifest_sha256"]) == 64
        assert found["parents"] == {}
        assert {"python", "torch", "cuda", "megatron-core", "openai-harmony"} <= set(found["packages"])
        assert found["hardware"]["cpus"] >= 1
        assert any("train" in argument for argument in found["command"])
        assert found["layout"] == {"world": 1, "dp": 1, "tp": 1, "ep": 1, "pp": 1}
        assert found["saved_unix_s"] >= found["started_unix_s"]
        assert found["iteration"] == step
        rows = read_metrics(Path(finished.work_dir) / "metrics.jsonl")
        assert found["tokens_consumed"]["total"] == rows[step]["consumed_tokens"]
        assert found["tokens_consumed"]["final"] == sum(row["tokens/final"] for row in rows[1 : step + 1])


def test_a_run_starts_from_published_weights_at_step_0_without_optimizer_state(
    finished, tmp_path, conversations
):
    parent = Path(finished.output_dir) / "payload"
    job = make_job(
        tmp_path, conversations, recipe=tiny_recipe(init="checkpoint", steps=2), inputs={"vpmoe": parent}
    )
    assert run_train(job) == EXIT_DONE
    found = summary(job)
    assert found["heldout_loss_start"] == pytest.approx(summary(finished)["heldout_loss_end"], abs=1e-6)
    assert found["resumed_from"] is None
    provenance = json.loads((Path(job.work_dir) / "checkpoints/iter_0000002/provenance.json").read_text())
    assert provenance["parents"]["vpmoe"]["digest"] == "d" * 64
    assert len(provenance["parents"]["vpmoe"]["provenance_sha256"]) == 64


def test_a_run_that_needs_a_parent_and_has_none_says_so(tmp_path, conversations):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(init="checkpoint"))
    assert run_train(job) == EXIT_FAILED
    assert "exactly one input with published weights" in status(job)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"harmony_fraction": 0.5}, "harmony_fraction"),
        ({"new_layers_only_steps": 2}, "new_layers_only_steps"),
        ({"new_layers_only_steps": 2, "new_layers": [3, 4]}, "new_layers_only_steps"),
        ({"scored_fraction": 0.5}, "scored_fraction"),
        ({"kd.kl_weight": 0.5}, "kd.kl_weight"),
        ({"training.backend": "fused"}, "fused"),
    ],
)
def test_what_the_trainer_does_not_do_is_refused_not_ignored(change, key, tmp_path, conversations):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**change))
    assert run_train(job) == EXIT_FAILED
    assert key in status(job)
    assert not Path(job.output_dir).exists()


def test_data_of_another_vocabulary_are_refused(tmp_path):
    from tests.trainer.train.train_jobs import write_conversations

    job = make_job(tmp_path, write_conversations(tmp_path / "data", vocab=200, rows=20, valid=8))
    assert run_train(job) == EXIT_FAILED
    assert "vocabulary of 200" in status(job)
    assert "256" in status(job)


class _Poison:
    """Makes the weights NaN after a step, so that the next step's loss is NaN."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.step = Engine.step

    def __enter__(self) -> None:
        step, after = self.step, self.after

        def poisoned(engine: Engine, **options):
            result = step(engine, **options)
            if result.step == after:
                with torch.no_grad():
                    engine.model.decoder.final_layernorm.weight.fill_(float("nan"))
            return result

        Engine.step = poisoned  # type: ignore[method-assign]

    def __exit__(self, *_) -> None:
        Engine.step = self.step  # type: ignore[method-assign]


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, conversations):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**{"training.eval_interval": 100}))
    with _Poison(after=4):
        assert run_train(job) == EXIT_FAILED
    text = status(job)
    assert text.startswith("failed: NonFiniteError: step 5: the loss is nan, from sample")
    assert "shard_0" in text, "the message names the documents"
    names = sorted(path.name for path in (Path(job.work_dir) / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000003"]
    assert losses(job)[-1] > 0
    assert len(losses(job)) == 4
    assert not Path(job.output_dir).exists()
    assert run_train(job) == EXIT_DONE, "a restart goes on from the last good checkpoint"
    assert summary(job)["resumed_from"] == 3


def test_a_batch_with_nothing_to_train_on_fails(tmp_path, own_conversations):
    for path in (own_conversations / "train").glob("*_lossmask.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    for path in (own_conversations / "train").glob("*_span.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    job = make_job(tmp_path, own_conversations)
    assert run_train(job) == EXIT_FAILED
    assert "no token to train on" in status(job)


def test_an_empty_validation_split_is_refused(tmp_path):
    from tests.trainer.train.train_jobs import write_conversations

    job = make_job(tmp_path, write_conversations(tmp_path / "data", valid=4))
    assert run_train(job) == EXIT_FAILED
    assert "validation split" in status(job)


def test_sigterm_saves_reports_interrupted_and_a_second_signal_in_the_save_harms_nothing(
    tmp_path, conversations
):
    job = make_job(
        tmp_path, conversations, recipe=tiny_recipe(steps=4000, **{"training.save_interval": 4000})
    )
    running = Ranks(1, train_slow_saves, job, 1.5)
    metrics = Path(job.work_dir) / "metrics.jsonl"
    wait_for(metrics)
    while metrics.read_text().count("\n") < 3:
        time.sleep(0.05)
    running.signal(signal.SIGTERM)
    heartbeat = Path(job.work_dir) / "heartbeat"
    time.sleep(0.7)
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)
    assert running.join() == [EXIT_INTERRUPTED]
    assert status(job) == "interrupted"
    assert json.loads(heartbeat.read_text())["phase"] == "save"
    (saved,) = (Path(job.work_dir) / "checkpoints").glob("iter_*")
    steps = json.loads((saved / "state.json").read_text())["iteration"]
    assert steps == read_metrics(metrics)[-1]["step"]
    assert not Path(job.output_dir).exists()
    assert train_until(job, steps + 2) == EXIT_INTERRUPTED, "and the run goes on"
    assert read_metrics(metrics)[-1]["step"] == steps + 2


def test_a_signal_to_one_rank_stops_them_all_at_one_step(tmp_path, conversations):
    job = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_ranks(2, train_until, job, 4) == [EXIT_INTERRUPTED] * 2
    assert status(job) == "interrupted"
    state = json.loads((Path(job.work_dir) / "checkpoints/iter_0000004/state.json").read_text())
    assert state["layout"]["dp"] == 2


def test_the_resume_check_sees_a_state_that_was_not_restored(finished, monkeypatch):
    """The check must be able to fail: forget the momentum of one matrix and it does."""
    resume = Engine.resume

    def forgetful(engine: Engine, checkpoints, iteration: int) -> None:
        resume(engine, checkpoints, iteration)
        part = next(p for p in engine.optimizer._parts if "momentum_buffer" in p.state)
        part.state["momentum_buffer"].zero_()

    with session("cpu") as layout:
        run = Run(finished, finished.train_recipe(), WorkDir(Path(finished.work_dir)), StopRequest(), layout)
        honest = resume_drift(run.engine, run.checkpoints, 6, 8)
        monkeypatch.setattr(Engine, "resume", forgetful)
        forgotten = resume_drift(run.engine, run.checkpoints, 6, 8)
    assert honest.max_abs_difference == 0.0
    assert honest.state_equal
    assert 0.0 < forgotten.max_abs_difference < 10.0


def test_the_resume_check_sees_other_random_states(finished, monkeypatch):
    step = Engine.step

    def drawing(engine: Engine, **options):
        np.random.random()  # noqa: NPY002
        return step(engine, **options)

    monkeypatch.setattr(Engine, "step", drawing)
    with session("cpu") as layout:
        run = Run(finished, finished.train_recipe(), WorkDir(Path(finished.work_dir)), StopRequest(), layout)
        found = resume_drift(run.engine, run.checkpoints, 6, 8)
    assert found.max_abs_difference == 0.0
    assert not found.state_equal


def test_the_trainer_never_imports_the_orchestrator():
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"dagster", "vpmoe_assets"}, path
