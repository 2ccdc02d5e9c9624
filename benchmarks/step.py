"""A training step of the locked model on one GPU: a baseline, `reference` and `fused`, whole or a slice.

    python -m benchmarks.step [--layers 4] [--backends baseline reference fused] [--micro-batch 1] [--record]
    python -m benchmarks.step --whole                # and `fused` with all 80 layers, in the same run
    python -m benchmarks.step --check                # a slice: hidden states and gradients against float32
    python -m benchmarks.step --layers 80 --backends fused --profile kernels.json

Steps are those of the engine: sampling, forward, backward, reduction, optimizer, metrics. Each backend runs
in this process, one after the other, from the same seeded weights over the same mock conversations. The
median step and the peak of memory are told; kernels and their time come from torch's profiler over one step.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.baseline import NAME as BASELINE
from benchmarks.baseline import built_as_baseline
from benchmarks.gpu_smoke import write_data
from benchmarks.job_file import write_job
from benchmarks.record import record
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.job.distributed import Layout, session
from trainer.model import gpt
from trainer.model import router as routing
from trainer.model.gpt import VPGPTModel, build_model
from trainer.train.captured import count_documents
from trainer.train.engine import Engine
from trainer.train.inputs import TrainingData, open_data

STAGE = "vpmoe_stage1"


def recipe_of(layers: int, backend: str, micro_batch: int, accumulate: int) -> TrainRecipe:
    """Return stage 1 of `bench` with some of its layers."""
    recipe = plain(load_experiment("bench").train_recipe(STAGE))
    recipe |= {"steps": 1000, "init": "fresh"}
    recipe["architecture"]["model"]["num_layers"] = layers
    batch = {"global_batch_size": micro_batch * accumulate, "micro_batch_size": micro_batch}
    recipe["training"] |= {"backend": backend, **batch}
    return parse(TrainRecipe, recipe)


def open_mock(base: Path, recipe: TrainRecipe) -> TrainingData:
    """Write mock conversations once, and open them."""
    data = base / "data"
    if not data.exists():
        write_data(data, recipe.architecture.vocab_size)
    path = write_job(
        base,
        command="train",
        asset=STAGE,
        experiment="bench",
        recipe=plain(recipe),
        seed=1234,
        inputs={"synth_kd_v1": data},
        execution={"device": "cuda"},
    )
    job = parse(Job, json.loads(path.read_text()))
    return open_data(job, recipe, cache_dir=base / "cache")


BOUNDS = {"hidden": 2.0, "median": 2.0, "largest": 3.0}
"""Errors of `fused` against float32, as multiples of those of `reference` in bf16, that are let pass."""


def require_right(found: dict[str, Any]) -> None:
    """End where `fused` is further from float32 than `reference` in bf16 by more than a small multiple.

    Raises:
        SystemExit: Before any timing.
    """
    for name, bound in BOUNDS.items():
        reference, fused = found[name]
        if not fused <= bound * max(reference, 1e-3):
            raise SystemExit(
                f"{name}: error of fused {fused:.2e}, of reference {reference:.2e}: more than {bound} times; "
                f"no time was taken. Worst: {found['worst against the reference'][:3]}"
            )


def engine_of(recipe: TrainRecipe, data: TrainingData, layout: Layout) -> Engine:
    """Build the model from the seed, and its engine."""
    settings = recipe.training
    model = build_model(
        recipe.architecture,
        dtype=Engine.dtype(settings),
        device=layout.device.type,
        seed=1234,
        backend=settings.backend,
    )
    return Engine(model, recipe, data, layout, seed=1234, config_hash="")


def time_steps(engine: Engine, steps: int, profile: Path | None) -> dict[str, Any]:
    """Run some steps; return their times, the memory they took, and what the device did in one."""
    began = time.perf_counter()
    first = engine.step()
    torch.cuda.synchronize()
    times, losses = [], [first.loss]
    set_up, since_start = time.perf_counter() - began, time.time() - psutil.Process().create_time()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        losses.append(engine.step().loss)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    optimizer = []
    launch = engine.optimizer.launch

    def timed(*arguments: Any, **options: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = launch(*arguments, **options)
        torch.cuda.synchronize()
        optimizer.append(1000 * (time.perf_counter() - start))
        return result

    engine.optimizer.launch = timed  # type: ignore[method-assign]
    for _ in range(3):
        engine.step()
    found = {
        "ms": round(statistics.median(times), 2),
        "all_ms": [round(t, 1) for t in times],
        "first_step_s": round(set_up, 1),
        "since_start_s": round(since_start, 1),
        "optimizer_ms": round(statistics.median(optimizer), 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(loss, 4) for loss in losses],
    }
    if profile is not None:
        found |= profiled(engine.step, profile)
        found["body"] = profiled(lambda: pass_body(engine), profile.with_suffix(".body.json"))
    return found


def pass_body(engine: Engine) -> None:
    """Run one micro-batch from embedding to final norm, and back."""
    places = engine.sampler.share(engine.sampler.next_batch())[0]
    batch = engine._collate(places)
    documents = count_documents(batch["doc_id"])
    batch = engine._to_device(batch)
    engine.optimizer.zero_grad()
    hidden, aux = engine.body(batch["tokens"], batch["position_ids"], batch["doc_id"], documents)
    (hidden.float().square().mean() + aux).backward()


def profiled(work: Callable[[], Any], trace: Path) -> dict[str, Any]:
    """Run something under torch's profiler; return kernels, their time, and the dearest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        work()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name[:160], []).append(event.device_time)
    dearest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:80]
    table = [[name, len(times), round(sum(times) / 1000, 2)] for name, times in dearest]
    trace.write_text(json.dumps(table, indent=0))
    return {
        "kernels": len(events),
        "device_ms": round(sum(sum(times) for times in by_name.values()) / 1000, 1),
        "dearest": table,
    }


def gradients(model: VPGPTModel, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Logits of one pass, and the gradient of every parameter for a fixed random direction, in float32."""
    tokens, positions, doc_id = batch
    hidden = model.forward_hidden(tokens, positions, doc_id)
    real = (batch[2] >= 0).t().unsqueeze(-1)
    direction = torch.randn(hidden.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    aux = model.pop_aux_loss()
    ((hidden.float() * direction * real).sum() / 1000 + aux).backward()
    found = {"hidden": (hidden.float() * real).detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.float()
            parameter.grad = None
    return found


def packed_rows(vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Make two rows: one-token documents, some of the window's length, some longer, padding."""
    tokens = torch.randint(0, vocabulary, (2, 2048), generator=torch.Generator().manual_seed(3))
    doc_id, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    for row, lengths in enumerate(([1, 1, 700, 300, 46, 1, 900], [1500, 128, 129, 127, 64])):
        at = 0
        for number, size in enumerate(lengths):
            doc_id[row, at : at + size] = number
            positions[row, at : at + size] = torch.arange(size)
            at += size
    return tuple(part.cuda() for part in (tokens, positions, doc_id))


class SameChoice:
    """Lets several models route as the first one did, or differences would be those of other experts."""

    def __init__(self) -> None:
        self.choices: list[torch.Tensor] = []
        self._select, self._load = routing.select_experts, gpt.load_backend

    @contextmanager
    def of(self, taken: Iterator[torch.Tensor] | None) -> Iterator[None]:
        """Note a model's choices, or give it those that were noted; routers are the reference's."""

        def select(*arguments: Any) -> torch.Tensor:
            if taken is not None:
                return next(taken)
            self.choices.append(self._select(*arguments))
            return self.choices[-1]

        routing.select_experts = select  # type: ignore[assignment]
        gpt.load_backend = lambda word: replace(self._load(word), route=routing.route_and_balance)
        try:
            yield
        finally:
            routing.select_experts, gpt.load_backend = self._select, self._load


def disturb(model: VPGPTModel) -> None:
    """Add noise to biases, gains and experts, which start at values that would hide errors."""
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.shape[0] == 256:
                noise = torch.randn(parameter.shape, generator=generator, device="cuda") * 0.02
                parameter.add_(noise.to(torch.bfloat16).to(parameter.dtype))


def check(layers: int) -> dict[str, Any]:
    """Compare both backends in bf16 with the reference in float32, on packed rows with padding."""
    recipe = recipe_of(layers, "reference", 1, 1)
    batch = packed_rows(recipe.architecture.vocab_size)
    made: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    same = SameChoice()
    for name, backend, dtype in (
        ("reference", "reference", torch.bfloat16),
        ("fused", "fused", torch.bfloat16),
        ("exact", "reference", torch.float32),
    ):
        with same.of(iter(list(same.choices)) if same.choices else None):
            model = build_model(recipe.architecture, dtype=dtype, device="cuda", seed=7, backend=backend)
            if weights:
                narrow = {key: value.to(dtype) for key, value in weights.items()}
                model.load_state_dict(narrow, strict=False)
            else:
                disturb(model)
                state = model.state_dict()
                weights = {key: value.float().cpu() for key, value in state.items() if value is not None}
            made[name] = gradients(model, batch)
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm().clamp_min(1e-30))

    rows = {
        name: (error(made["reference"][name], exact), error(made["fused"][name], exact))
        for name, exact in made["exact"].items()
        if exact.norm() > 0
    }
    worst = sorted(rows.items(), key=lambda pair: -pair[1][1] / max(pair[1][0], 1e-3))[:12]
    return {
        "compared": len(rows),
        "hidden": rows["hidden"],
        "median": [statistics.median(pair[side] for pair in rows.values()) for side in (0, 1)],
        "largest": [max(pair[side] for pair in rows.values()) for side in (0, 1)],
        "worst against the reference": worst,
    }


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--backends", nargs="+", default=[BASELINE, "reference", "fused"])
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="take times without comparing first")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.check:
        with session("cuda"):
            print(json.dumps(check(options.layers), indent=1))
        return
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "layers": options.layers}
    runs = [(backend, options.layers, backend) for backend in options.backends]
    if options.whole:
        runs.append(("fused_whole", 80, "fused"))
    with tempfile.TemporaryDirectory() as folder, session("cuda") as layout:
        if "fused" in options.backends and not options.unchecked:
            found["check"] = check(min(options.layers, 4))
            require_right(found["check"])
            print("check", json.dumps({name: found["check"][name] for name in BOUNDS}), flush=True)
        for name, layers, backend in runs:
            slow = backend == BASELINE
            word = "reference" if slow else backend
            recipe = recipe_of(layers, word, options.micro_batch, options.accumulate)
            with built_as_baseline() if slow else nullcontext():
                began = time.perf_counter()
                engine = engine_of(recipe, open_mock(Path(folder), recipe), layout)
                built = time.perf_counter() - began
                found[name] = {
                    "build_s": round(built, 1),
                    **time_steps(engine, options.steps, options.profile),
                }
            if name != runs[0][0]:
                del found[name]["since_start_s"]  # it would count those before it
            print(name, json.dumps({k: v for k, v in found[name].items() if k != "dearest"}), flush=True)
            engine.close()
            del engine
            gc.collect()
            torch.cuda.empty_cache()
    first = options.backends[0]
    for backend in options.backends[1:]:
        print(f"{backend}: {found[first]['ms'] / found[backend]['ms']:.1f} times as fast as {first}")
    print(json.dumps(found))
    if options.record:
        if len(options.backends) == 1:
            only = found[options.backends[0]]
            batch = f".micro_batch_{options.micro_batch}x{options.accumulate}"
            name = f"step.{options.layers}_layers.{options.backends[0]}"
            name += batch if options.micro_batch * options.accumulate > 1 else ""
            record(name, only["ms"], "ms", details=only)
        if options.whole:
            record("step.80_layers.fused", found["fused_whole"]["ms"], "ms", details=found["fused_whole"])
        for backend in options.backends[1:]:
            record(
                f"step.{options.layers}_layers.{backend}",
                found[backend]["ms"],
                "ms",
                comparator=options.backends[0],
                ratio=found[options.backends[0]]["ms"] / found[backend]["ms"],
                details=found[backend],
            )


if __name__ == "__main__":
    main()
