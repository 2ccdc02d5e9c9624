"""`python -m trainer profile`: the command line."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.printed import exact_json, print_refusal
from trainer.profiling import nsys
from trainer.profiling.recorded import under_nsys

if TYPE_CHECKING:
    from trainer.contract.schema.job import Job
    from trainer.contract.schema.profile import ProfileRecipe
    from trainer.job.signals import StopRequest
    from trainer.job.workdir import WorkDir

DESCRIPTION = """Measures a training step of an experiment's model from random weights, on mock conversations:
time by part of the step and by kind of layer beside the least that this device could take, kernels, model
FLOP/s, memory, routers. On a CPU it says so, and measures the smoke experiment unless told otherwise."""

EXAMPLES = """examples:
  python -m trainer profile                                    bench on a GPU, smoke on a CPU
  python -m trainer profile bench --backend fused --micro-batch 8
  python -m trainer profile bench --layers 4 --json
  python -m trainer profile bench --nsys                       with a timeline of Nsight Systems
  python -m trainer profile --job job.json

what it leaves in OUTPUT:
  payload/profile.json   the figures
  run.profile.json       the same with commit, time and command
  work/.traces/          raw traces, for chrome://tracing or Nsight Systems; they are not published

exit codes:
  0   done
  75  interrupted by SIGINT or SIGTERM; nothing is kept
  1   failed or refused: the message says why
  2   wrong arguments
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; imports nothing heavy."""
    parser.add_argument("config", nargs="?", help="name of an experiment, or path of a .toml file")
    parser.add_argument("--job", type=Path, metavar="FILE", help="what to measure, as a job file")
    parser.add_argument("--json", action="store_true", help="print the report instead of tables")
    parser.add_argument(
        "--traces",
        action=argparse.BooleanOptionalAction,
        help="keep raw traces in the work directory (default: without a job file)",
    )
    parser.add_argument(
        "--nsys",
        action="store_true",
        help="record a timeline of Nsight Systems first, which must be installed",
    )
    flags = parser.add_argument_group("without a job file")
    flags.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    flags.add_argument("--backend", metavar="WORD", help="default: the experiment's")
    flags.add_argument("--layers", type=int, metavar="N", help="a slice of the model: its first layers")
    flags.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a forward pass")
    flags.add_argument("--global-batch", type=int, metavar="N", help="sequences of a step")
    flags.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence")
    flags.add_argument("--warm-up", type=int, metavar="N", help="steps before any counts")
    flags.add_argument("--steps", type=int, metavar="N", help="steps that are timed")
    for name, what in (("dp", "data"), ("tp", "tensor"), ("ep", "expert")):
        flags.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{what}-parallel ranks, under torchrun"
        )
    flags.add_argument("--output", type=Path, metavar="DIR", help="default: a new profile-… directory here")
    flags.add_argument("--work", type=Path, metavar="DIR", help="work directory (default: OUTPUT/work)")


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.job import load_job
    from trainer.contract.status import EXIT_DONE, EXIT_FAILED
    from trainer.errors import ProfileError
    from trainer.job.lifecycle import run_job

    try:
        _refuse(options)
        job = load_job(options.job) if options.job else _job(options)
        job.profile_recipe()
        if options.nsys and not under_nsys():
            nsys.record(job)
    except (ConfigError, ProfileError, OSError) as error:
        print_refusal(error)
        return EXIT_FAILED

    keep_traces = options.job is None if options.traces is None else options.traces

    def work(job: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.job.startup import load_megatron

        load_megatron()
        from trainer.job.workdir import LOGGER
        from trainer.profiling.profile import profile

        where = job.execution.device
        LOGGER.info(
            "a training step of %s on %s; another experiment or device can be named", job.experiment, where
        )
        profile(job, directory, stop, keep_traces=keep_traces)

    code = run_job(job, work)
    if code == EXIT_DONE and os.environ.get("RANK", "0") == "0" and not under_nsys():
        _print(job, as_json=options.json)
    return code


def _refuse(options: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    from trainer.contract.schema.base import ConfigError

    flags = (
        *("config", "device", "backend", "layers", "micro_batch", "global_batch"),
        *("seq_len", "warm_up", "steps", "output", "work"),
    )
    if options.job and (given := [name for name in flags if getattr(options, name) is not None]):
        names = ", ".join(name if name == "config" else f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names} beside --job: a job file says all of it; leave one of them out")
    if options.device == "cuda" and _device() == "cpu":
        raise ConfigError("--device cuda: torch finds no GPU here; give --device cpu or use a GPU machine")


def _job(options: argparse.Namespace) -> "Job":
    """Return the job that the flags describe."""
    from datetime import UTC, datetime

    from trainer.contract.canonical import sha256_json
    from trainer.contract.schema.base import parse, plain
    from trainer.contract.schema.experiment import load_experiment
    from trainer.contract.schema.job import Job

    device = options.device or _device()
    config = options.config or ("bench" if device == "cuda" else "smoke")
    experiment = load_experiment(config)
    recipe = plain(_changed(experiment.profile_recipe(), options))
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    output = options.output or Path(f"profile-{experiment.name}-{stamp}")
    job: Job = parse(
        Job,
        {
            "schema": "vpmoe.job/1",
            "command": "profile",
            "asset": "perf_profile",
            "experiment": experiment.name,
            "recipe": recipe,
            "recipe_fingerprint": sha256_json({"recipe": recipe, "seed": experiment.seed}),
            "seed": experiment.seed,
            "inputs": {},
            "execution": {
                "device": device,
                "nproc": options.dp * options.tp,
                **{name: getattr(options, name) for name in ("dp", "tp", "ep")},
                "wandb": "disabled",
            },
            "provenance": dict.fromkeys(("git_sha", "source_digest", "lock_digest"), "by hand")
            | {"git_dirty": True},
            "work_dir": str(options.work or output / "work"),
            "output_dir": str(output),
        },
        origin="command line",
    )
    return job


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _changed(recipe: "ProfileRecipe", options: argparse.Namespace) -> "ProfileRecipe":
    """Return a recipe with what the flags ask for."""
    from trainer.contract.schema.base import parse, plain
    from trainer.contract.schema.profile import ProfileRecipe

    raw: dict[str, Any] = plain(recipe)
    training, model = raw["training"], raw["architecture"]["model"]
    if options.backend is not None:
        training["backend"] = options.backend
    if options.layers is not None:
        model["num_layers"] = options.layers
    if options.micro_batch is not None:
        training["micro_batch_size"] = options.micro_batch
        training["global_batch_size"] = max(training["global_batch_size"], options.micro_batch * options.dp)
    if options.global_batch is not None:
        training["global_batch_size"] = options.global_batch
    if options.seq_len is not None:
        raw["seq_len"] = options.seq_len
    if options.warm_up is not None:
        raw["warm_up_steps"] = options.warm_up
    if options.steps is not None:
        raw["timed_steps"] = options.steps
    raw["steps"] = raw["warm_up_steps"] + raw["timed_steps"] + ProfileRecipe.TRACED_STEPS
    changed: ProfileRecipe = parse(ProfileRecipe, raw, origin="command line")
    return changed


def _print(job: "Job", *, as_json: bool) -> None:
    import json

    from trainer.contract.status import PAYLOAD_NAME
    from trainer.profiling.report import ENVELOPED_NAME, NAME

    content = json.loads((Path(job.output_dir) / PAYLOAD_NAME / NAME).read_bytes())
    if as_json:
        print(exact_json(content, indent=2))
        return
    from trainer.profiling.printing import print_report

    print_report(content)
    print(f"{Path(job.output_dir) / ENVELOPED_NAME}")
