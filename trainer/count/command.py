"""`python -m trainer count CONFIG`: parameters, memory, disk and tokens of an experiment's models."""

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainer.contract.printed import exact_json, print_refusal

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.contract.disk import DiskPlan
    from trainer.contract.memory import MemoryPlan
    from trainer.contract.parameters import ParameterCount
    from trainer.contract.schema.experiment import Experiment

DESCRIPTION = """Counts parameters and tokens; plans memory and disk of training, and
the store of a teacher's scores. All of it comes from the config alone: nothing is built."""

EXAMPLES = """examples:
  python -m trainer count full                            every rung of an experiment
  python -m trainer count bench --rung vpmoe --json       one rung, as JSON; sizes in bytes
  python -m trainer count full --rung vpmoe --dp 8 --ep 8 one layout
"""

LAYOUTS = ((1, False), (1, True), (8, False), (8, True))
"""Data-parallel ranks, and whether optimizer state is spread over them; shown without another wish."""


@dataclass(frozen=True)
class Rung:
    """The figures of one rung.

    Attributes:
        count: Its parameters.
        memory: A plan for each layout.
        disk: A plan for each run that trains it, by the run's asset.
    """

    count: "ParameterCount"
    memory: list["MemoryPlan"]
    disk: dict[str, "DiskPlan"]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; sizes in bytes."""
        count = self.count
        return {
            "total": count.total,
            "non_embedding": count.non_embedding,
            "active": count.active,
            "active_non_embedding": count.active_non_embedding,
            "expert_bias_entries": count.expert_bias_entries,
            "components": count.components,
            "memory_bytes_per_gpu": [plan.as_dict() for plan in self.memory],
            "disk_bytes": {asset: plan.as_dict() for asset, plan in self.disk.items()},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; imports nothing heavy."""
    parser.add_argument("config", help="name of an experiment (configs/NAME.toml) or path of a .toml file")
    parser.add_argument("--rung", help="one rung, such as vpmoe; all of them by default")
    for name, what in (("dp", "data"), ("tp", "tensor"), ("ep", "expert")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}-parallel ranks of a layout")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def main(options: argparse.Namespace) -> int:
    """Count and print.

    Args:
        options: Parsed, of `add_arguments`.

    Returns:
        Exit status: 0, or 1 after a message on standard error.
    """
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment
    from trainer.contract.tokens import run_tokens, store_size

    try:
        experiment = load_experiment(options.config)
        rungs = [options.rung] if options.rung else rungs_with_geometry(experiment)
        layout = (options.dp, options.tp, options.ep)
        asked = tuple(1 if size is None else size for size in layout) if layout != (None,) * 3 else None
        found = {rung: count_rung(experiment, rung, asked) for rung in rungs}
    except ConfigError as error:
        print_refusal(error)
        return 1
    if options.json:
        report: dict[str, Any] = {
            "experiment": experiment.name,
            "rungs": {name: rung.as_dict() for name, rung in found.items()},
        }
        if options.rung is None:
            report["runs"] = {asset: asdict(run) for asset, run in run_tokens(experiment).items()}
            if (store := store_size(experiment)) is not None:
                report["teacher_topk"] = store.as_dict()
        print(exact_json(report, indent=2))
    else:
        for name, rung in found.items():
            print_tables(experiment, name, rung)
        if options.rung is None:
            print_distillation(experiment)
    return 0


def rungs_with_geometry(experiment: "Experiment") -> list[str]:
    """Rungs that the trainer builds; the donor's own architecture is not one of them."""
    from trainer.contract.schema.rungs.rung import RungConfig

    return [name for name, table in experiment.rungs.items() if isinstance(table, RungConfig)]


def count_rung(experiment: "Experiment", rung: str, layout: tuple[int, ...] | None = None) -> Rung:
    """Count one rung and plan its training.

    Args:
        experiment: The loaded config.
        rung: Asset name of a rung with a geometry of its own.
        layout: Data-, tensor- and expert-parallel ranks; None for each of `LAYOUTS`.

    Raises:
        ConfigError: No such rung, or it cannot be trained in this layout.
    """
    from trainer.contract.disk import disk_plan
    from trainer.contract.memory import Layout, memory_plan
    from trainer.contract.parameters import count_parameters
    from trainer.contract.schema.base import parse
    from trainer.contract.schema.job import Execution

    arch = experiment.architecture(rung)
    recipes = {asset: experiment.train_recipe(asset) for asset in experiment.runs()}
    recipes = {asset: recipe for asset, recipe in recipes.items() if recipe.architecture == arch}
    seq_len = min(experiment.data.synth_kd_v1.seq_len, arch.attention.max_sequence_length)
    training = next((recipe.training for recipe in recipes.values()), experiment.training)
    if layout is None:
        asked = [(Layout(dp), shard) for dp, shard in LAYOUTS]
    else:
        dp, tp, ep = layout
        ranks = {"device": "cuda", "nproc": dp * tp, "dp": dp, "tp": tp, "ep": ep}
        execution = parse(Execution, ranks, origin="execution")
        for recipe in recipes.values():
            rows = {
                "global_batch_size": dp * recipe.training.micro_batch_size
            }  # memory does not depend on it
            batch = recipe.training.model_copy(update=rows)
            execution.check_recipe(recipe.model_copy(update={"training": batch}))
        asked = [(Layout(dp, tp, ep), True)]
    memory = [memory_plan(arch, training, each, seq_len=seq_len, shard=shard) for each, shard in asked]
    disk = {asset: disk_plan(recipe) for asset, recipe in recipes.items()}
    return Rung(count_parameters(arch), memory, disk)


def print_tables(experiment: "Experiment", name: str, rung: Rung) -> None:
    """Print a rung's breakdown, its memory plans and the disk that its runs take."""
    from rich.table import Table

    count = rung.count
    title = f"{experiment.name}/{name}"
    parameters = Table(title=f"{title}: parameters", title_justify="left")
    parameters.add_column("component")
    parameters.add_column("parameters", justify="right")
    for component, amount in count.components.items():
        if amount:
            parameters.add_row(component, f"{amount:,}")
    parameters.add_section()
    for label, amount in (
        ("total", count.total),
        ("non-embedding", count.non_embedding),
        ("active", count.active),
        ("active non-embedding", count.active_non_embedding),
    ):
        parameters.add_row(label, f"{amount:,}")
    if count.expert_bias_entries:
        parameters.add_section()
        parameters.add_row("expert-bias buffers (fp32, not trained)", f"{count.expert_bias_entries:,}")

    training = experiment.training
    memory = Table(
        title=f"{title}: GB per GPU, {training.dtype} weights, {training.optimizer.name}, "
        f"micro-batch {training.micro_batch_size}, backend {training.backend}",
        title_justify="left",
    )
    memory.add_column("layout")
    entries = (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("master", "master"),
        ("momentum", "momentum"),
        ("row_second_moments", "row moments"),
        ("adam", "adam"),
        ("activations", "activations"),
        ("work", "work"),
        ("total", "total"),
    )
    for _, label in entries:
        memory.add_column(label, justify="right")
    for plan in rung.memory:
        ranks = plan.layout
        split = "".join(
            f", {key.upper()}={size}" for key, size in (("tp", ranks.tp), ("ep", ranks.ep)) if size > 1
        )
        label = f"DP={ranks.dp}{split}, {'sharded' if plan.sharded else 'replicated'}"
        memory.add_row(label, *(f"{getattr(plan, entry) / 1e9:,.3f}" for entry, _ in entries))

    disk = Table(title=f"{title}: GB on disk", title_justify="left")
    for label in ("run", "one checkpoint", "at most", "rollouts", "weights", "total"):
        disk.add_column(label, justify="left" if label == "run" else "right")
    for asset, run in rung.disk.items():
        figures = (run.checkpoint, run.rollouts, run.weights, run.total)
        sizes = [f"{size / 1e9:,.3f}" if size else "" for size in figures]
        disk.add_row(asset, sizes[0], str(run.checkpoints), *sizes[1:])
    _print(parameters, memory, *([disk] if rung.disk else []))


def print_distillation(experiment: "Experiment") -> None:
    """Print the tokens of every run, and the store of the teacher's scores where there is one."""
    from rich.table import Table

    from trainer.contract.tokens import run_tokens, store_size
    from trainer.contract.topk.size import SOURCE

    found = run_tokens(experiment)
    kinds = list(dict.fromkeys(kind for run in found.values() for kind in run.by_kind))
    runs = Table(title=f"{experiment.name}: million tokens, padding included", title_justify="left")
    for label in ("run", "steps", "tokens", *kinds):
        runs.add_column(label, justify="left" if label == "run" else "right")
    for asset, run in found.items():
        amounts = [run.tokens, *(run.by_kind.get(kind) for kind in kinds)]
        shown = ["" if amount is None else f"{amount / 1e6:,.1f}" for amount in amounts]
        runs.add_row(asset, f"{run.steps:,}", *shown)
    tables = [runs]
    if (size := store_size(experiment)) is not None:
        store = Table(
            title=f"{experiment.name}/teacher_topk: estimates; bytes per token {SOURCE}", title_justify="left"
        )
        for label in ("conversations", "supervised tokens", "layout", "bytes per token", "GB"):
            store.add_column(label, justify="left" if label == "layout" else "right")
        known = [size.conversations, size.tokens]
        counts = ["unknown" if amount is None else f"{amount:,}" for amount in known]
        for layout, each, total in (
            ("store", size.bytes_per_token, size.bytes),
            ("int32 + fp16", size.plain_bytes_per_token, size.plain_bytes),
        ):
            gigabytes = "unknown" if total is None else f"{total / 1e9:,.3f}"
            store.add_row(*counts, layout, f"{each:,.1f}", gigabytes)
        tables.append(store)
    _print(*tables)


def _print(*tables: "Table") -> None:
    from rich.console import Console

    # A pipe has no width; 80 columns would cut the figures.
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.width = max(console.width, 60)  # of a terminal that says it has none
    with console.capture() as captured:  # rich has its own way to end where nobody reads
        console.print(*tables, sep="\n")
    print(captured.get(), end="")
