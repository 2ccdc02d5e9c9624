"""`python -m trainer <command>`: the trainer's command line.

Arguments are parsed before anything heavy is imported, so `--help` and a wrong flag answer at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trainer
from trainer.contract.pipe import quiet_when_unread
from trainer.contract.printed import print_refusal, print_whatever_comes
from trainer.contract.sources import ForeignSourcesError, require_meant
from trainer.contract.status import EXIT_FAILED
from trainer.count import command as count_command
from trainer.generate import command as generate_command
from trainer.job.prompt_end import PromptEnd
from trainer.job.startup import wait_passively
from trainer.profiling import command as profile_command
from trainer.teacher import command as score_command

if TYPE_CHECKING:
    from trainer.contract.schema.job import Job
    from trainer.job.lifecycle import Work
    from trainer.job.signals import StopRequest
    from trainer.job.workdir import WorkDir

EXAMPLES = """examples:
  python -m trainer train --job job.json                          one process
  torchrun --nproc-per-node 8 -m trainer train --job job.json     eight; the job says nproc = 8
  python -m trainer convert --job job.json                        one rung of the ladder from the one before
  python -m trainer evaluate --job job.json                       measure several checkpoints in one process
  python -m trainer score --job job.json --shard 0 --of 4         a teacher's distributions, shared out
  python -m trainer generate --checkpoint DIR --tokenizer DIR --prompt "The sea is"
  python -m trainer count full --rung vpmoe                       parameters and memory
  python -m trainer profile bench                                 where the time of a training step goes

exit codes:
  0   done: output_dir holds payload/ and summary.json
  75  interrupted by SIGINT or SIGTERM after saving; run the same command again to go on
  1   failed: the last line of the log and work_dir/STATUS say why
  2   wrong arguments
"""


CONVERT_EXAMPLES = """the recipe's `step` says what is done:
{steps}

example:
  python -m trainer convert --job job.json

exit codes:
  0   done: output_dir holds payload/ and summary.json
  75  interrupted by SIGINT or SIGTERM, nothing delivered; run the same command again to start over
  1   failed: the last line of the log and work_dir/STATUS say why
  2   wrong arguments
"""

EVALUATE_EXAMPLES = """the recipe's `suites`:
  core8    accuracy on eight tasks
  ppl      perplexity of held-out text and conversations
  numeric  exact copying of numbers
  harmony  format of generated conversations
and, for checkpoints with experts, the health of their routers

example:
  python -m trainer evaluate --job job.json --batch-tokens 131072

exit codes:
  0   done: output_dir holds payload/ (a report and its examples for each object), reports/ (the same with
      commit and time) and summary.json
  75  interrupted by SIGINT or SIGTERM; run the same command again to go on with the next task
  1   failed: the last line of the log and work_dir/STATUS say why
  2   wrong arguments
"""


class _NamingSteps(argparse.RawDescriptionHelpFormatter):
    """Names the steps of `convert` when its help is asked for; until then nobody reads their files."""

    def add_text(self, text: str | None) -> None:
        """Add a text, the steps filled in."""
        if text is not None and "{steps}" in text:
            from trainer.surgery.steps import described_steps

            text = text.replace("{steps}", described_steps())
        super().add_text(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands of this installation."""
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
    convert = commands.add_parser(
        "convert",
        help="make a checkpoint from another as a job file says",
        description="Converts a checkpoint: vocabulary, donor to dense, attention morph, depth, experts. "
        "Reads and writes one tensor at a time, reads everything back, measures the function of the result "
        "against its source, then delivers. A conversion that was cut short starts over.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=_NamingSteps,
    )
    convert.add_argument("--job", type=Path, required=True, metavar="FILE", help="what to convert")
    convert.set_defaults(run=_convert)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure checkpoints as a job file says",
        description="Measures every checkpoint that the recipe names, of either format, and writes a report "
        "of each. Tasks that an earlier start of the same job finished are not done again.",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--job", type=Path, required=True, metavar="FILE", help="what to measure")
    evaluate.add_argument(
        "--batch-rows",
        type=_positive,
        metavar="N",
        help="most rows of a batch (default: what suits the device)",
    )
    evaluate.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help="most tokens of a batch, padding included (default: what suits the device)",
    )
    evaluate.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="checkpoints measured at once on a CPU (default: one a thread, as memory allows)",
    )
    evaluate.set_defaults(run=_evaluate)
    score = commands.add_parser(
        "score",
        help="store a teacher's likeliest tokens for conversations",
        description=score_command.DESCRIPTION,
        epilog=score_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score_command.add_arguments(score)
    score.set_defaults(run=score_command.main)
    generate = commands.add_parser(
        "generate",
        help="continue a prompt or answer in a conversation",
        description=generate_command.DESCRIPTION,
        epilog=generate_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate_command.add_arguments(generate)
    generate.set_defaults(run=generate_command.main)
    count = commands.add_parser(
        "count",
        help="parameters, memory and disk of an experiment's models",
        description=count_command.DESCRIPTION,
        epilog=count_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count_command.add_arguments(count)
    count.set_defaults(run=count_command.main)
    profile = commands.add_parser(
        "profile",
        help="time and memory of a training step",
        description=profile_command.DESCRIPTION,
        epilog=profile_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    profile_command.add_arguments(profile)
    profile.set_defaults(run=profile_command.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program name; the process's own by default.

    Returns:
        The exit code.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == [] or (isinstance(value, list) and [] in value):  # what argparse makes of --name=--
            parser.error(f"--{name.replace('_', '-')}=--: -- is no value")
    try:
        require_meant("trainer", trainer.__file__)
    except ForeignSourcesError as error:
        print_refusal(error)
        return EXIT_FAILED
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (text := os.environ.get(name, "0")).isdecimal():
            print(f"error: {name} = {text!r} is no number: unset it, or start with torchrun", file=sys.stderr)
            return EXIT_FAILED
    wait_passively()
    # Said at import about Transformer Engine and Apex; what needs them says so itself.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    code: int = options.run(options)
    return code


def _run(options: argparse.Namespace, recipe_of: Callable[["Job"], object], work: "Work") -> int:
    """Run a job once it is known to be one of this command, and Megatron once the job has its heartbeat."""
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.job import load_job
    from trainer.job.lifecycle import run_job

    try:
        job = load_job(options.job)
        recipe_of(job)
    except ConfigError as error:
        print_refusal(error)
        return EXIT_FAILED

    def loaded(job: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.job.startup import load_megatron

        load_megatron()
        work(job, directory, stop)

    return run_job(job, loaded)


def _train(options: argparse.Namespace) -> int:
    def work(job: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.train.run import train

        verify = options.verify_resume and job.execution.verify_resume
        train(job, directory, stop, verify_resume=verify)

    return _run(options, lambda job: job.train_recipe(), work)


def _convert(options: argparse.Namespace) -> int:
    def work(job: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.surgery.convert import convert

        convert(job, directory, stop)

    return _run(options, lambda job: job.convert_recipe(), work)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _evaluate(options: argparse.Namespace) -> int:
    def work(job: "Job", directory: "WorkDir", stop: "StopRequest") -> None:
        from trainer.evaluate.evaluate import evaluate
        from trainer.evaluate.suite import Batching

        batching = Batching.default(job.execution.device)
        if options.batch_rows or options.batch_tokens:
            rows, tokens = options.batch_rows or batching.rows, options.batch_tokens or batching.tokens
            batching = Batching(rows, tokens)
        evaluate(job, directory, stop, batching=batching, count=options.processes)

    return _run(options, lambda job: job.evaluate_recipe(), work)


if __name__ == "__main__":
    end = PromptEnd()  # before others register, so that it comes after them
    print_whatever_comes()
    end.code = quiet_when_unread(main)
    sys.exit(end.code)
