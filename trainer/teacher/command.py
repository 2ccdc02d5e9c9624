"""`python -m trainer score`: the command line."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.printed import print_refusal

if TYPE_CHECKING:
    from trainer.contract.schema.job import Job
    from trainer.job.signals import StopRequest
    from trainer.job.workdir import WorkDir

DESCRIPTION = """Scores conversations under a teacher, and stores its likeliest tokens at each supervised one.

Killed or stopped, the same command goes on; several processes share the work with --shard, and a last one
without it delivers.
"""

EXAMPLES = """examples:
  python -m trainer score --job job.json
  python -m trainer score --job job.json --shard 0 --of 4
  python -m trainer score --teacher DIR --data SYNTH_KD_V1 --output DIR --topk 32
  python -m trainer score --teacher DIR --data SYNTH_KD_V1 --output DIR --topk 24 --tail-draws 8 \\
      --subset-fraction 0.2 --device cuda --dtype bf16

a teacher is a checkpoint of ours, a Hugging Face directory, or a directory with teacher.json, which says what
a server serves; its addresses are read from the environment variable $VPMOE_TEACHER_URL

exit codes:
  0   done: output holds payload/ and summary.json (with --shard: these shards are made)
  75  interrupted by SIGINT or SIGTERM; run the same command again to go on
  1   failed: the last line of the log and work_dir/STATUS say why
  2   wrong arguments
"""

WORKERS_NAME = "workers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; imports nothing heavy."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--job", type=Path, metavar="FILE", help="what to score, as a job file")
    what.add_argument("--teacher", type=Path, metavar="DIR", help="or by flags: the teacher's payload")
    share = parser.add_argument_group("several processes")
    share.add_argument(
        "--shard", type=int, metavar="I", help="make the shards that are I modulo N, and no more"
    )
    share.add_argument("--of", type=int, metavar="N", help="number of processes")
    share.add_argument(
        "--batch-tokens", type=int, metavar="N", help="most tokens of a batch (weights in memory)"
    )
    flags = parser.add_argument_group("without a job file")
    flags.add_argument("--data", type=Path, metavar="DIR", help="payload of synth_kd_v1")
    flags.add_argument("--output", type=Path, metavar="DIR", help="gets payload/ and summary.json")
    flags.add_argument("--work", type=Path, metavar="DIR", help="work directory (default: OUTPUT/work)")
    flags.add_argument("--tokenizer", type=Path, metavar="DIR", help="o200k rank file; for another mode")
    flags.add_argument("--topk", type=int, default=32, metavar="K", help="default: 32")
    flags.add_argument(
        "--mass", type=float, metavar="P", help="list as many as have this probability together"
    )
    flags.add_argument("--tail-draws", type=int, default=0, metavar="M", help="default: 0")
    flags.add_argument(
        "--subset-fraction", type=float, default=1.0, metavar="F", help="default: 1, all of it"
    )
    flags.add_argument("--logprob-error", type=float, default=0.01, metavar="E", help="default: 0.01")
    modes = ("low", "medium", "high")
    flags.add_argument("--reasoning-mode", choices=modes, default="high", help="asked of it (default: high)")
    flags.add_argument("--stored-mode", choices=modes, default="high", help="of the data (default: high)")
    flags.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draws (default: 1234)")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    flags.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.job import load_job
    from trainer.contract.status import EXIT_FAILED
    from trainer.job.lifecycle import run_job

    try:
        _refuse(options)
        job = load_job(options.job) if options.job else _job(options)
        job.score_recipe()
    except (ConfigError, OSError) as error:
        print_refusal(error)
        return EXIT_FAILED

    def work(own: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.job.startup import load_megatron

        load_megatron()
        from trainer.teacher.score import Share, score

        del own  # the job's own directory holds the shards, a worker's what it says of itself
        share = None if options.shard is None else Share(options.shard, options.of)
        score(job, directory, stop, share=share, batch_tokens=options.batch_tokens)

    if options.shard is None:
        return run_job(job, work)
    place = Path(job.work_dir) / WORKERS_NAME / str(options.shard)
    return run_job(job.model_copy(update={"work_dir": str(place)}), work)


def _refuse(options: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    from trainer.contract.schema.base import ConfigError

    if (options.shard is None) != (options.of is None):
        raise ConfigError("--shard and --of go together: --shard 0 --of 4 is the first of four processes")
    if options.of is not None and not 0 <= options.shard < options.of:
        raise ConfigError(f"--shard {options.shard} --of {options.of}: shards are 0 to {options.of - 1}")
    if options.batch_tokens is not None and options.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {options.batch_tokens}: at least 1")
    if options.teacher and (
        missing := [name for name in ("data", "output") if getattr(options, name) is None]
    ):
        raise ConfigError(f"--teacher needs --{' and --'.join(missing)} too")


def _job(options: argparse.Namespace) -> "Job":
    """Return the job that the flags describe; digests of inputs are taken from their files."""
    from trainer.contract.canonical import sha256_json
    from trainer.contract.schema.base import parse
    from trainer.contract.schema.job import Job
    from trainer.teacher.files_digest import files_digest

    recipe: dict[str, Any] = {
        "topk": options.topk,
        "subset_fraction": options.subset_fraction,
        "tail_draws": options.tail_draws,
        "logprob_error": options.logprob_error,
        "reasoning_mode": options.reasoning_mode,
        "stored_mode": options.stored_mode,
        "dtype": options.dtype,
    }
    if options.mass is not None:
        recipe["mass"] = options.mass
    inputs = {"teacher": options.teacher, "synth_kd_v1": options.data}
    if options.tokenizer is not None:
        inputs["o200k_tokenizer"] = options.tokenizer
    given = {name: {"path": str(path), "digest": files_digest(path)} for name, path in inputs.items()}
    work = options.work or options.output / "work"
    return parse(
        Job,
        {
            "schema": "vpmoe.job/1",
            "command": "score",
            "asset": "teacher_topk",
            "experiment": "by_hand",
            "recipe": recipe,
            "recipe_fingerprint": sha256_json(
                {"recipe": recipe, "inputs": {name: one["digest"] for name, one in given.items()}}
            ),
            "seed": options.seed,
            "inputs": given,
            "execution": {"device": options.device},
            "provenance": {
                "git_sha": "by hand",
                "git_dirty": True,
                "source_digest": "by hand",
                "lock_digest": "by hand",
            },
            "work_dir": str(work),
            "output_dir": str(options.output),
        },
        origin="command line",
    )
