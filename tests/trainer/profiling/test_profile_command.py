"""The command line of `profile`: what flags make of a job, and what is refused before any work."""

import argparse
import json
import sys
import textwrap

import pytest

from trainer.__main__ import build_parser, main
from trainer.contract.schema.base import ConfigError, plain
from trainer.errors import ProfileError
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


def recorder(tmp_path, body: str):
    """Return a program in place of nsys."""
    program = tmp_path / "nsys"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(body)}")
    program.chmod(0o755)
    return str(program)


def test_nsys_records_the_same_job_elsewhere_and_leaves_its_timeline_alone(monkeypatch, tmp_path):
    program = recorder(
        tmp_path,
        """
        import json, os, pathlib, sys
        asked = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
        job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
        told = {"job": job, "under": os.environ["VPMOE_UNDER_NSYS"], "asked": asked}
        pathlib.Path(asked["--output"] + ".nsys-rep").write_text(json.dumps(told))
        """,
    )
    monkeypatch.setattr(nsys.shutil, "which", lambda name: program)
    job = command._job(options("bench", "--device", "cuda", "--output", str(tmp_path / "out")))
    nsys.record(job)
    traces = tmp_path / "out" / "work" / ".traces"
    (timeline,) = traces.iterdir()
    told = json.loads(timeline.read_text())
    assert told["under"] == "1"
    assert told["asked"]["--capture-range"] == "cudaProfilerApi"
    assert told["job"]["recipe"] == plain(job)["recipe"]
    assert told["job"]["output_dir"] != job.output_dir, "nothing of it is delivered"


def test_a_recorder_that_fails_or_leaves_nothing_is_told(monkeypatch, tmp_path):
    job = command._job(options("bench", "--device", "cuda", "--output", str(tmp_path / "out")))
    for body, said in (("raise SystemExit(3)", "exit code 3"), ("pass", "left no timeline")):
        program = recorder(tmp_path, body)
        monkeypatch.setattr(nsys.shutil, "which", lambda name, program=program: program)
        with pytest.raises(ProfileError, match=said):
            nsys.record(job)


def test_nsys_is_refused_for_several_ranks(monkeypatch, tmp_path):
    monkeypatch.setattr(nsys.shutil, "which", lambda name: "/bin/nsys")
    job = command._job(options("bench", "--device", "cuda", "--dp", "2", "--output", str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="this job has 2"):
        nsys.record(job)


def test_every_experiment_has_a_profile_that_starts_from_the_seed():
    from trainer.contract.schema.experiment import load_experiment

    for name in ("smoke", "bench", "full"):
        recipe = load_experiment(name).profile_recipe()
        assert recipe.init == "fresh"
        assert recipe.steps == recipe.warm_up_steps + recipe.timed_steps + 3
    assert load_experiment("full").profile_recipe().training.global_batch_size == 8
