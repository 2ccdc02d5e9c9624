"""`python -m trainer <command>`: the trainer's command line.

Arguments are parsed before anything heavy is imported, so `--help` and a wrong flag answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  python -m trainer train --job job.json                          one process
  torchrun --nproc-per-node 8 -m trainer train --job job.json     eight; the job says nproc = 8
  python -m trainer count full --rung vpmoe                       parameters and memory

exit codes:
  0   done: output_dir holds payload/ and summary.json
  75  interrupted by SIGINT or SIGTERM after saving; run the same command again to go on
  1   failed: the last line of the log and work_dir/STATUS say why
  2   wrong arguments
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands of this installation."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Trains and measures vpMoE models. A job is a file of schema vpmoe.job/1.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model as a job file says",
        description="Trains, going on from work_dir where a run was cut short, and publishes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--job", type=Path, required=True, metavar="FILE", help="what to train")
    train.add_argument(
        "--verify-resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at the end, repeat the last two steps from their checkpoint and put the difference into the "
        "summary as resume_drift (default: on)",
    )
    train.set_defaults(run=_train)
    count = commands.add_parser(
        "count", help="parameters and memory of an experiment's models", add_help=False
    )
    count.add_argument("rest", nargs=argparse.REMAINDER)
    count.set_defaults(run=_count)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command line without the program name; the process's own by default.

    Returns:
        The exit code.
    """
    options = build_parser().parse_args(arguments)
    # Read when torch is imported. OpenMP's threads spin at the end of every parallel region by default, which
    # on a machine with other work to do makes a step ten times slower; waiting passively costs nothing
    # measurable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code: int = options.run(options)
    return code


def _train(options: argparse.Namespace) -> int:
    from trainer.config import ConfigError, Job, load_job
    from trainer.lifecycle import run_job
    from trainer.signals import StopRequest
    from trainer.workdir import EXIT_FAILED, WorkDir

    try:
        job = load_job(options.job)
        job.train_recipe()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED

    def work(job: Job, directory: WorkDir, stop: StopRequest) -> None:
        from trainer.train import train

        train(job, directory, stop, verify_resume=options.verify_resume)

    return run_job(job, work)


def _count(options: argparse.Namespace) -> int:
    from trainer.count import main as count

    return count(options.rest)


if __name__ == "__main__":
    sys.exit(main())
