"""Does `fused` learn as `reference` does? 200 steps of a slice of the locked model, on given or mock shards.

    python -m benchmarks.band [--layers 4] [--steps 200] [--seeds 3] [--record]
    python -m benchmarks.band --comparator fused --set optimizer.momentum_dtype=fp32 --record
    python -m benchmarks.band --data PAYLOAD     # of a synth_kd_v1 with rows of the experiment's length
    python -m benchmarks.band --experiment smoke --device cpu --steps 6 --candidate reference   # to test it

Stage 1 from a seeded init. `reference` runs once for each seed of the weights and of the order of samples;
the widest distance of two of its curves at a step, smoothed over ten steps, is the band there. `fused` runs
with the first seed alone, and with what `--set` changes of the training table: what an option costs the loss
is asked of one backend on both sides. Printed are the band and the distance of `fused` from `reference` with
the same seed. It is inside where its mean distance is at most the mean band, and the mean of its last quarter
lies within those of the seeds, widened by half their range on both sides. Exit code 1 where it is not.

On a GPU the curves run side by side, a process each: `reference` leaves the device idle most of the time.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_smoke import write_data
from benchmarks.job_file import write_job
from benchmarks.processes import run_apart
from benchmarks.record import record
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.job.distributed import DeviceKind, Layout, session
from trainer.model.gpt import build_model
from trainer.train.engine import Engine
from trainer.train.inputs import TrainingData, open_data

STAGE = "vpmoe_stage1"
LOSSES = "losses.json"
SMOOTHED = 10
FIRST_SEED = 1234


def recipe_of(
    experiment: str, layers: int | None, steps: int, backend: str, changes: str | None = None
) -> TrainRecipe:
    """Return stage 1 of an experiment from a seeded init, some of its layers.

    Args:
        experiment: Name, or path of a `.toml`.
        layers: How many; None for all.
        steps: Of the run.
        backend: Of the run.
        changes: `KEY=VALUE` of the training table, the key dotted; None for none.
    """
    recipe = plain(load_experiment(experiment).train_recipe(STAGE))
    recipe |= {"steps": steps, "init": "fresh"}
    if layers is not None:
        recipe["architecture"]["model"]["num_layers"] = layers
    recipe["training"]["backend"] = backend
    if changes is not None:
        key, _, value = changes.partition("=")
        *tables, last = key.split(".")
        table = recipe["training"]
        for name in tables:
            table = table[name]
        if last not in table:
            raise SystemExit(
                f"--set {changes}: no key {key} in the training table; it has {', '.join(table)}"
            )
        table[last] = value
    return parse(TrainRecipe, recipe)


def open_shards(
    shards: Path, own: Path, recipe: TrainRecipe, experiment: str, device: str, seed: int
) -> TrainingData:
    """Open the shards of a folder in the order of a seed; what is kept of it goes to a folder of the run."""
    path = write_job(
        own,
        command="train",
        asset=STAGE,
        experiment=experiment,
        recipe=plain(recipe),
        seed=seed,
        inputs={"synth_kd_v1": shards},
        execution={"device": device},
    )
    job = parse(Job, json.loads(path.read_text()))
    return open_data(job, recipe, cache_dir=own / "cache")


def curve(recipe: TrainRecipe, data: TrainingData, layout: Layout, seed: int) -> list[float]:
    """Train and return the loss of every step."""
    settings = recipe.training
    model = build_model(
        recipe.architecture,
        dtype=Engine.dtype(settings),
        device=layout.device.type,
        seed=seed,
        backend=settings.backend,
    )
    engine = Engine(model, recipe, data, layout, seed=seed, config_hash="")
    losses = [engine.step().loss for _ in range(recipe.steps)]
    engine.close()
    del engine, model
    gc.collect()
    if layout.device.type == "cuda":
        torch.cuda.empty_cache()
    return losses


def run(
    folder: Path,
    shards: Path,
    experiment: str,
    device: DeviceKind,
    layers: int | None,
    steps: int,
    backend: str,
    seed: int,
    changes: str | None,
) -> None:
    """Train, and leave the losses in the folder."""
    recipe = recipe_of(experiment, layers, steps, backend, changes)
    own = _folder_of(folder, backend, seed, changes)
    with session(device) as layout:
        losses = curve(recipe, open_shards(shards, own, recipe, experiment, device, seed), layout, seed)
    told = [round(loss, 4) for loss in losses[:: max(1, len(losses) // 20)]]
    print(f"{backend}, seed {seed}, {changes or 'as it is'}: {told}", flush=True)
    (own / LOSSES).write_text(json.dumps(losses))


def _folder_of(folder: Path, backend: str, seed: int, changes: str | None) -> Path:
    return folder / f"{backend}_{seed}_{changes or 'as_it_is'}"


def smoothed(losses: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return means over `SMOOTHED` steps, or over all where there are fewer."""
    width = min(SMOOTHED, len(losses))
    return np.convolve(np.asarray(losses, dtype=np.float64), np.ones(width) / width, mode="valid")


def judged(references: list[list[float]], candidate: list[float]) -> dict[str, Any]:
    """Compare a candidate's curve with those of the reference, of which the first has its seed.

    Args:
        references: Losses of every step, a list for each seed, two at least.
        candidate: Losses of every step.
    """
    curves, ours = np.stack([smoothed(one) for one in references]), smoothed(candidate)
    band = curves.max(0) - curves.min(0)
    distance = np.abs(ours - curves[0])
    quarter = max(1, len(candidate) // 4)
    ends = [float(np.mean(one[-quarter:])) for one in references]
    end, room = float(np.mean(candidate[-quarter:])), (max(ends) - min(ends)) / 2
    return {
        "band": {"mean": float(band.mean()), "largest": float(band.max())},
        "distance": {"mean": float(distance.mean()), "largest": float(distance.max())},
        "mean_share_of_band": float(distance.mean() / max(band.mean(), 1e-12)),
        "ends": ends,
        "end": end,
        "inside": min(ends) - room <= end <= max(ends) + room and bool(distance.mean() <= band.mean()),
    }


def main() -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="bench")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="payload of a synth_kd_v1; default: made of mock text")
    parser.add_argument("--candidate", default="fused")
    parser.add_argument("--comparator", default="reference", help="the backend that the seeds are run on")
    parser.add_argument("--set", metavar="KEY=VALUE", help="of the candidate's training table")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a band takes two at least")
    layers = options.layers or (4 if options.experiment == "bench" else None)
    device: DeviceKind = options.device
    seeds = [FIRST_SEED + number for number in range(options.seeds)]
    curves = [
        (options.candidate, FIRST_SEED, options.set),
        *((options.comparator, seed, None) for seed in seeds),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = options.data
        if shards is None:
            shards = folder / "data"
            whole = recipe_of(options.experiment, layers, 1, options.comparator)
            write_data(shards, whole.architecture.vocab_size)
        common = folder, shards, options.experiment, device, layers, options.steps
        wanted = list(dict.fromkeys(curves))
        run_apart(run, [(*common, *one) for one in wanted], side_by_side=device == "cuda")
        candidate, *references = (
            json.loads((_folder_of(folder, *one) / LOSSES).read_text()) for one in curves
        )
    found = judged(references, candidate) | {
        "candidate": options.candidate,
        "comparator": options.comparator,
        "set": options.set,
        "data": "shards made of mock text" if options.data is None else f"{options.data.name}, given",
        "layers": layers,
        "steps": options.steps,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    print(json.dumps(found))
    if options.record:
        share = found["mean_share_of_band"]
        record(
            f"band.{options.candidate}" + (f".{options.set}" if options.set else ""),
            found["distance"]["mean"],
            "nats",
            comparator=f"seeds of {options.comparator}",
            ratio=1 / max(share, 1e-12),
            details=found,
        )
    return 0 if found["inside"] else 1


if __name__ == "__main__":
    sys.exit(main())
