"""The command line of `profile`: what flags make of a job, and what is refused before any work."""

import argparse
import json

import pytest

from trainer.__main__ import build_parser, main
from trainer.profiling import command, nsys


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["profile", *arguments])


def test_flags_change_the_experiments_recipe_and_nothing_else():
    plain = command._job(options("bench", "--device", "cuda", "--output", "out"))
    asked = command._job(
        options(
            *("bench", "--device", "cuda", "--output", "out", "--backend", "fused", "--layers", "4"),
            *("--micro-batch", "8", "--steps", "5", "--warm-up", "2"),
        )
    )
    recipe = asked.profile_recipe()
    assert recipe.training.backend == "fused"
    assert (recipe.training.micro_batch_size, recipe.training.global_batch_size) == (8, 8)
    assert recipe.architecture.model.num_layers == 4
    assert (recipe.warm_up_steps, recipe.timed_steps, recipe.steps) == (2, 5, 10)
    assert recipe.training.optimizer == plain.profile_recipe().training.optimizer
    assert asked.recipe_fingerprint != plain.recipe_fingerprint
    assert asked.output_dir == "out"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--job", "job.json", "--layers", "4"], "--layers beside --job"),
        (["smoke", "--device", "cpu", "--backend", "fast"], "training.backend"),
        (["smoke", "--device", "cpu", "--steps", "0"], "timed_steps"),
        (["smoke", "--device", "cpu", "--layers", "6"], "num_layers"),
        (["smoke", "--device", "cpu", "--global-batch", "3", "--micro-batch", "2"], "micro_batch_size"),
        (["smok", "--device", "cpu"], "did you mean 'smoke'?"),
        (["--job", "there-is-none.json"], "no such job file"),
        (["smoke", "--device", "cpu", "--seq-len", "1"], "seq_len = 1 holds no mock conversation"),
        (["bench", "--device", "cuda"], "--device cuda: torch finds no GPU here"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_device", lambda: "cpu")
    assert main(["profile", *arguments]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_nsys_is_refused_where_it_is_not_installed_or_sees_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nsys.shutil, "which", lambda name: None)
    assert main(["profile", "smoke", "--device", "cpu", "--nsys"]) == 1
    assert "install Nsight Systems" in capsys.readouterr().err
    monkeypatch.setattr(nsys.shutil, "which", lambda name: "/bin/nsys")
    assert main(["profile", "smoke", "--device", "cpu", "--nsys"]) == 1
    assert "the device is cpu" in capsys.readouterr().err


def test_under_nsys_the_same_command_is_started_again_and_keeps_its_output(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(nsys.shutil, "which", lambda name: "/bin/nsys")
    monkeypatch.setattr(nsys.os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(nsys.sys, "argv", ["trainer", "profile", "bench", "--device", "cuda", "--nsys"])
    job = command._job(options("bench", "--device", "cuda", "--nsys"))
    nsys.start_again(job)
    ((_, arguments, environment),) = started
    assert environment["VPMOE_UNDER_NSYS"] == "1"
    assert arguments[-2:] == ["--output", job.output_dir]
    assert "--capture-range=cudaProfilerApi" in arguments
    assert json.dumps(arguments).count("profile") >= 2


def test_every_experiment_has_a_profile_that_starts_from_the_seed():
    from trainer.contract.schema.experiment import load_experiment

    for name in ("smoke", "bench", "full"):
        recipe = load_experiment(name).profile_recipe()
        assert recipe.init == "fresh"
        assert recipe.steps == recipe.warm_up_steps + recipe.timed_steps + 3
    assert load_experiment("full").profile_recipe().training.global_batch_size == 8
