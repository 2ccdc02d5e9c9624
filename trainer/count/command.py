"""`python -m trainer count CONFIG`: parameters and memory of an experiment's models, in seconds."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.experiment import Experiment, load_experiment
from trainer.contract.schema.rungs import RungConfig
from trainer.count.memory import MemoryPlan, memory_plan
from trainer.count.parameters import ParameterCount, count_built, count_by_formula
from trainer.model.gpt import build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ((1, False), (1, True), (8, False), (8, True))


def count_rung(experiment: Experiment, rung: str) -> tuple[ParameterCount, list[MemoryPlan]]:
    """Count one rung both ways and plan its memory.

    Args:
        experiment: The loaded config.
        rung: Asset name of a rung with a geometry of its own.

    Returns:
        The count, and one plan for each of `LAYOUTS`.

    Raises:
        ConfigError: No such rung, or the formula and the built model disagree.
    """
    arch = experiment.architecture(rung)
    formula = count_by_formula(arch)
    # On the meta device tensors have shapes and no storage: 6 billion parameters take a second and no memory.
    model = build_model(arch, dtype=DTYPES[experiment.training.dtype], device="meta")
    built = count_built(arch, model.named_parameters())
    if formula != built:
        wrong = [
            f"{name}: formula {expected:,}, built {built.components[name]:,}"
            for name, expected in formula.components.items()
            if expected != built.components[name]
        ]
        raise ConfigError(f"rungs.{rung}: the formula and the built model disagree on {'; '.join(wrong)}")
    optimizer = experiment.training.optimizer
    plans = [memory_plan(model.named_parameters(), optimizer, dp=dp, shard=shard) for dp, shard in LAYOUTS]
    return formula, plans


def as_json(count: ParameterCount, plans: list[MemoryPlan]) -> dict[str, Any]:
    """Return the figures of one rung as JSON values; sizes in bytes."""
    return {
        "total": count.total,
        "non_embedding": count.non_embedding,
        "active": count.active,
        "active_non_embedding": count.active_non_embedding,
        "expert_bias_entries": count.expert_bias_entries,
        "components": count.components,
        "memory_bytes_per_gpu": [plan.as_dict() for plan in plans],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments after `count`; those of the process by default.

    Returns:
        Exit status: 0, or 1 after a message on standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer count", description=__doc__)
    parser.add_argument("config", help="name of an experiment (configs/NAME.toml) or path of a .toml file")
    parser.add_argument("--rung", help="one rung, such as vpmoe; all of them by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)
    try:
        experiment = load_experiment(arguments.config)
        rungs = [arguments.rung] if arguments.rung else rungs_with_geometry(experiment)
        results = {rung: count_rung(experiment, rung) for rung in rungs}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        report = {
            "experiment": experiment.name,
            "rungs": {rung: as_json(*found) for rung, found in results.items()},
        }
        print(json.dumps(report, indent=2))
    else:
        for rung, (count, plans) in results.items():
            print_tables(experiment, rung, count, plans)
    return 0


def rungs_with_geometry(experiment: Experiment) -> list[str]:
    """Rungs that the trainer builds; the donor's own architecture is not one of them."""
    return [name for name, table in experiment.rungs.items() if isinstance(table, RungConfig)]


def print_tables(experiment: Experiment, rung: str, count: ParameterCount, plans: list[MemoryPlan]) -> None:
    """Print a rung's breakdown and memory plan."""
    from rich.console import Console
    from rich.table import Table

    parameters = Table(title=f"{experiment.name}/{rung}: parameters", title_justify="left")
    parameters.add_column("component")
    parameters.add_column("parameters", justify="right")
    for name, amount in count.components.items():
        if amount:
            parameters.add_row(name, f"{amount:,}")
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
        title=f"{experiment.name}/{rung}: GB per GPU, {training.dtype} weights, {training.optimizer.name}, "
        "without activations",
        title_justify="left",
    )
    memory.add_column("layout")
    entries = ("weights", "gradients", "master", "momentum", "row_second_moments", "adam", "total")
    for entry in entries:
        memory.add_column(entry.replace("_", " "), justify="right")
    for plan in plans:
        label = f"DP={plan.dp}, {'sharded' if plan.sharded else 'replicated'}"
        memory.add_row(label, *(f"{getattr(plan, entry) / 1e9:,.3f}" for entry in entries))
    # A pipe has no width; 80 columns would cut the figures.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(parameters, memory, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
