"""A run that the machine cannot hold is refused before a model is built, with what would help."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.ranks import run_ranks
from tests.trainer.train.on_policy_jobs import on_policy_recipe
from tests.trainer.train.train_jobs import make_job, tiny_recipe
from tests.trainer.train.train_work import run_train
from trainer.contract.disk import disk_plan
from trainer.contract.memory import Layout, memory_plan
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.status import EXIT_DONE, EXIT_FAILED
from trainer.train import room

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def locked(*, momentum: str = "bf16", **training: int | str) -> TrainRecipe:
    recipe = load_experiment("bench").train_recipe("vpmoe_stage1")
    optimizer = recipe.training.optimizer.model_copy(update={"momentum_dtype": momentum})
    words = {"optimizer": optimizer, "backend": "reference", **training}
    changed = recipe.training.model_copy(update=words)
    return recipe.model_copy(update={"training": changed})


def memory(recipe: TrainRecipe, free_gib: float, layout: Layout | None = None) -> str | None:
    plan = memory_plan(recipe.architecture, recipe.training, layout or Layout(), seq_len=recipe.seq_len)
    return room.memory_problem(plan, int(free_gib * GIB), recipe, "cuda:0")


def test_bench_is_accepted_on_a_card_of_80_gb_as_it_is():
    assert load_experiment("bench").training.backend == "fused"
    assert memory(locked(backend="fused"), 78.6) is None


def test_on_the_reference_bench_is_refused_on_a_card_of_80_gb_and_two_are_named():
    """A card of 80 GB has 79.1 GiB; the forward pass ran out of memory there."""
    said = memory(locked(), 78.6) or ""
    assert said.startswith("cuda:0: a training step needs 82.8 GiB (weights 11.2 GiB, gradients 22.4 GiB, ")
    assert "with dp 1, tp 1, ep 1, and 78.6 GiB are free" in said
    assert "execution.dp = 2, with a training.global_batch_size that 2 divides (needs 64.7 GiB)" in said
    assert "momentum_dtype" not in said, "it is bf16 already"


def test_on_the_reference_bench_is_accepted_on_an_h200_and_on_two_cards():
    assert memory(locked(), 139) is None
    assert memory(locked(), 78.6, Layout(2)) is None


def test_a_plan_that_is_only_slightly_over_is_not_refused():
    assert memory(locked(), 82.8 / 1.015) is None
    assert memory(locked(), 82.8 / 1.025) is not None


def test_every_remedy_that_is_named_is_one():
    recipe = locked(momentum="fp32", micro_batch_size=2, global_batch_size=4)
    said = memory(recipe, 100) or ""
    for remedy in (
        'training.optimizer.momentum_dtype = "bf16" (needs 93.4 GiB)',
        "training.micro_batch_size = 1 (needs 93.2 GiB)",
        'training.optimizer.momentum_dtype = "bf16" and training.micro_batch_size = 1 (need 82.8 GiB)',
        "execution.dp = 2 (needs 80.5 GiB)",
    ):
        assert remedy in said
    assert memory(locked(momentum="bf16", micro_batch_size=2, global_batch_size=4), 100) is None
    assert memory(locked(momentum="fp32", micro_batch_size=1, global_batch_size=4), 100) is None
    assert memory(recipe, 100, Layout(2)) is None


def test_where_no_single_change_does_they_are_joined():
    said = memory(locked(momentum="fp32", micro_batch_size=2, global_batch_size=4), 70) or ""
    assert 'momentum_dtype = "bf16" (needs' not in said
    assert (
        'training.optimizer.momentum_dtype = "bf16" and training.micro_batch_size = 1 and execution.dp = 2 '
        "(needs 64.7 GiB)"
    ) in said


def test_experts_are_spread_where_more_copies_of_them_do_not_fit():
    said = memory(locked(), 44) or ""
    assert "execution.dp = 4 and execution.ep = 4, with a training.global_batch_size that 4 divides" in said
    assert memory(locked(), 44, Layout(4, 1, 4)) is None
    assert memory(locked(), 44, Layout(64)) is not None


def test_where_nothing_helps_no_remedy_is_made_up():
    assert (memory(locked(), 8) or "").endswith("Remedies: use a device with more memory")


def test_a_teacher_in_the_same_memory_takes_of_what_is_free():
    recipe = locked()
    plan = memory_plan(recipe.architecture, recipe.training, Layout(), seq_len=recipe.seq_len)
    assert room.memory_problem(plan, 139 * GIB, recipe, "cuda:0", teacher=50 * GIB) is None
    said = room.memory_problem(plan, 139 * GIB, recipe, "cuda:0", teacher=70 * GIB) or ""
    assert (
        "and 69.0 GiB are free beside the teacher's weights of 70.0 GiB. Remedies: execution.dp = 2" in said
    )
    assert said.endswith("serve the teacher (sources.teacher.kind = 'server')")


def test_a_teachers_weights_are_counted_as_they_are_loaded(tmp_path, conversations):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    tensors = {"a": torch.zeros(8, 3, dtype=torch.bfloat16), "b_blocks": torch.zeros(5, 2, dtype=torch.uint8)}
    save_file(tensors, teacher / "model.safetensors")
    for recipe, bytes_each in (
        (on_policy_recipe(), 4),
        (on_policy_recipe(**{"training.dtype": "bf16"}), 2),
        (tiny_recipe(), 0),  # asks no teacher
    ):
        job = make_job(tmp_path, conversations, recipe=recipe, inputs={"teacher": teacher})
        assert room.teacher_memory(job, job.train_recipe()) == (24 + 20) * bytes_each
    (teacher / "model.safetensors").unlink()  # a served one is a description
    job = make_job(tmp_path, conversations, recipe=on_policy_recipe(), inputs={"teacher": teacher})
    assert room.teacher_memory(job, job.train_recipe()) == 0


@pytest.fixture
def job(tmp_path, conversations):
    return make_job(tmp_path, conversations, recipe=tiny_recipe(**{"training.keep_last": 3}))


def disk(monkeypatch, job, free: float, **options: bool) -> str | None:
    """Say what is missing where `free` times the planned bytes are free."""
    total = disk_plan(job.train_recipe()).total
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(free * total)))
    return room.disk_problem(job, job.train_recipe(), **options)


def test_a_disk_without_room_is_refused_and_what_would_do_is_named(monkeypatch, job):
    """Saved are steps 3, 6 and 8; three are kept, step 6 for the resume check too."""
    plan = disk_plan(job.train_recipe())
    assert plan.checkpoints == 3
    assert disk(monkeypatch, job, 1.0) is None
    said = disk(monkeypatch, job, 0.8) or ""
    assert said.startswith(f"{Path(job.work_dir) / 'checkpoints'}: the run needs ")
    assert "at most 3 resume checkpoints of" in said
    assert "training.keep_last = 1 (needs" in said
    assert "--no-verify-resume" not in said, "three would still be kept"
    assert said.endswith("a work directory on another disk, or room made on this one")
    assert "keep_last = 1" not in (disk(monkeypatch, job, 0.1) or "")


def test_what_an_earlier_start_left_is_room(monkeypatch, job):
    checkpoints = Path(job.work_dir) / "checkpoints" / "iter_0000003"
    checkpoints.mkdir(parents=True)
    (checkpoints / "x.distcp").write_bytes(bytes(disk_plan(job.train_recipe()).total // 4))
    assert disk(monkeypatch, job, 0.8) is None
    shutil.rmtree(checkpoints)
    assert disk(monkeypatch, job, 0.8) is not None


def test_directories_on_two_disks_are_looked_at_apart(monkeypatch, job):
    monkeypatch.setattr(room, "_disk_of", lambda path: hash(path))
    plan = disk_plan(job.train_recipe())
    roomy = {Path(job.work_dir): plan.work_dir, Path(job.output_dir): plan.weights}

    def usage(path: Path) -> Usage:
        return Usage(0, 0, next((free for at, free in roomy.items() if at in (path, *path.parents)), 0))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for directory in roomy:
        directory.mkdir(parents=True)
    assert room.disk_problem(job, job.train_recipe()) is None
    roomy[Path(job.output_dir)] //= 2
    assert (room.disk_problem(job, job.train_recipe()) or "").startswith(job.output_dir)


def test_memory_of_a_container_is_its_limit_and_shared_by_its_ranks(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    whole = room.free_memory(cpu)
    for name, text in (
        ("memory.max", "4000000000\n"),
        ("memory.current", "1500000000\n"),
        ("memory.stat", "anon 1\ninactive_file 500000000\n"),
    ):
        (tmp_path / name).write_text(text)
    limited = ((tmp_path / "memory.max", tmp_path / "memory.current", "inactive_file"),)
    monkeypatch.setattr(room, "_CGROUPS", limited)
    assert room.free_memory(cpu) == min(3_000_000_000, whole) or whole < 3_000_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room.free_memory(cpu) <= 750_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_memory(cpu) > 750_000_000 or whole < 3_000_000_000


def test_a_run_without_room_ends_before_a_model_is_built(monkeypatch, job, capfd):
    def built(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr("trainer.train.run.build_model", built)
    monkeypatch.setattr(room, "free_memory", lambda device: 1 << 16)
    assert run_train(job) == EXIT_FAILED
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert status.startswith("failed: NoRoomError: cpu: a training step needs ")
    assert "0.1 MiB are free" in status
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_with_room_says_what_it_plans(job):
    assert run_train(job) == EXIT_DONE
    assert "planned at the peak of a step" in (Path(job.work_dir) / "log.txt").read_text()


def _cramped_on_rank_1(job) -> int:
    import os

    free = 1 << 16 if os.environ["RANK"] == "1" else 1 << 40
    room.free_memory = lambda device: free
    return run_train(job)


def test_every_rank_refuses_what_one_cannot_hold(tmp_path, conversations):
    job = make_job(tmp_path, conversations, nproc=2, dp=2)
    assert run_ranks(2, _cramped_on_rank_1, job) == [EXIT_FAILED, EXIT_FAILED]
    assert "NoRoomError: cpu: a training step needs" in (Path(job.work_dir) / "STATUS").read_text()
