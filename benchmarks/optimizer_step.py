"""The optimizer part of a step of the locked model on one GPU: by kernels and part by part, time and error.

    python -m benchmarks.optimizer_step [--layers 4 80] [--record]   # each part's time, device and host
    python -m benchmarks.optimizer_step --check                      # errors of every kind of update
    python -m benchmarks.optimizer_step --sweep                      # tilings of the experts' kernel

Parameters are those of stage 1 of `bench` with some of its layers, gradients random with a spectrum that
falls by three decades where the experts' are, momentum in bf16. `batched` is the step without kernels, as
every other backend has it. Errors are of the update, relative in Frobenius norm, against the batched path
with products in float32; the same path in bf16 stands beside as the measure of what bf16 costs anyway. Times
are medians of five steps: on the device, and until the host had launched all.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.record import record
from benchmarks.step import recipe_of
from trainer.contract.parameters import parameters
from trainer.contract.schema.training import OptimizerConfig
from trainer.model.parameters import mark, mark_written
from trainer.optim.low_halves import belongs
from trainer.optim.optimizer import Optimizer
from trainer.optim.parts import Part
from trainer.optim.polar_express import COEFFICIENTS, polar_express
from trainer.optim.routing import Route
from trainer.optim.small_matrices import TILING, SmallMatrices, Tiling
from trainer.optim.topology import Topology

REPEATS = 5
SWEEP = (
    TILING,
    Tiling(restart=2),
    Tiling(stages=2),
    Tiling(stages=4),
    Tiling(wide=32, tall=32, stages=4),
    Tiling(wide=128, tall=64, stages=2),
    Tiling(wide=64, tall=64, stages=2, programs=2, registers=128),
    Tiling(wide=32, tall=32, stages=3, programs=2, registers=128),
    Tiling(wide=64, tall=64, stages=3, warps=16),
    Tiling(wide=128, tall=128, stages=2, warps=16),
)


class Weights(torch.nn.Module):
    """Random weights of the locked model, with the marks that the optimizer reads."""

    def __init__(self, layers: int, device: str) -> None:
        super().__init__()
        recipe = recipe_of(layers, "fused", 1, 1)
        self.settings: OptimizerConfig = recipe.training.optimizer
        for index, entry in enumerate(parameters(recipe.architecture)):
            dtype = torch.float32 if entry.float32 else torch.bfloat16
            param = torch.nn.Parameter(torch.empty(entry.shape, dtype=dtype, device=device).normal_(std=0.02))
            if entry.kind == "embeddings":
                param.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
            mark(
                param,
                matrix_batch=True if entry.kind == "matrices" and len(entry.shape) == 3 else None,
                vector_batch=True if entry.kind == "vectors" and len(entry.shape) == 2 else None,
                keep_fp32=True if entry.float32 else None,
            )
            self.register_parameter(f"{index:04d} {entry.component}".replace(".", " "), param)

    def draw_gradients(self) -> None:
        """Give every parameter a gradient."""
        for param in self.parameters():
            grad: torch.Tensor = param.main_grad  # type: ignore[attr-defined]
            grad.normal_(std=1e-3)
            if getattr(param, "matrix_batch", False):
                short = min(grad.shape[1:])
                fall = torch.logspace(0, -3, short, device=grad.device)
                mixed = torch.randn(short, short, device=grad.device) * fall / short**0.5
                for piece in grad.split(64):
                    wide = piece.size(1) == short
                    piece.copy_(mixed @ piece if wide else piece @ mixed.T)
            mark_written(param)


def built(layers: int, *, kernels: bool, seed: int = 0) -> tuple[Weights, Optimizer]:
    """Make weights and their optimizer, in the middle of a training."""
    torch.manual_seed(seed)
    weights = Weights(layers, "cuda")
    optimizer = Optimizer(weights, weights.settings, clip_grad=1.0, kernels=kernels, topology=Topology())
    optimizer.zero_grad()
    weights.draw_gradients()
    return weights, optimizer


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Return the median milliseconds of something on the device, and until the host had launched it."""
    work()
    device, host = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        work()
        stop.record()
        host.append(1000 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        device.append(start.elapsed_time(stop))
    return {"device_ms": round(statistics.median(device), 3), "host_ms": round(statistics.median(host), 3)}


@torch.no_grad()
def time_parts(layers: int, *, kernels: bool) -> dict[str, Any]:
    """Time a whole step, and with kernels each of its parts."""
    torch.cuda.reset_peak_memory_stats()
    weights, optimizer = built(layers, kernels=kernels)

    def step() -> None:
        optimizer.zero_grad()
        for param in weights.parameters():
            mark_written(param)
        optimizer.step(1.0)

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"first_step_s": round(time.perf_counter() - began, 1), "step": timed(step)}
    found["allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    device = optimizer._device_step
    if device is None:
        found["norm"] = timed(optimizer._norm)
    else:
        parts = {
            "numbers": lambda: device.prepare(lambda route: route.lr, steps=3),
            "norm": lambda: device.measure(1.0, None),
            "small matrices": lambda: device.small.step(device.rates, device.gate),
            "large matrices": lambda: device.large.step(device.rates, device.gate),
            "elementwise": lambda: device.elementwise.step(device.rates, device.gate),
        }
        found |= {name: timed(work) for name, work in parts.items()}
        for group in device.small._groups:
            work = partial(device.small._launch, group, device.rates, device.gate)
            found[f"{group.addresses.size(0)} of {group.m} x {group.n}"] = timed(work)
    optimizer.close()
    return found


def updates(optimizer: Optimizer, before: dict[str, torch.Tensor]) -> Iterator[tuple[Part, torch.Tensor]]:
    """Return what a step did to each master weight."""
    for part in optimizer._parts:
        yield part, part.read_master() - before[part.name].to(part.weight.device)


@torch.no_grad()
def check(layers: int) -> dict[str, Any]:
    """Compare the updates of one step with those of products in float32, by kind of parameter."""
    found: dict[str, Any] = {}
    exact: dict[str, torch.Tensor] = {}
    for way in ("exact", "batched", "kernels"):
        _, optimizer = built(layers, kernels=way == "kernels")
        if way == "exact":
            optimizer._orthogonalize = partial(polar_express, dtype=torch.float32)
        before = {part.name: part.read_master().cpu() for part in optimizer._parts}
        stats = optimizer.step(1.0)
        for part, update in updates(optimizer, before):
            if way == "exact":
                exact[part.name] = update.cpu()
                continue
            wanted = exact[part.name].to(update.device)
            rows = (-1, part.matrix[0] * part.matrix[1]) if part.route.algorithm == "normuon" else (1, -1)
            error = (update - wanted).view(rows).norm(dim=1) / wanted.view(rows).norm(dim=1)
            kind = f"{part.name.split(' ', 1)[1]} {list(part.weight.shape)}"
            entry = found.setdefault(way, {"grad_norm": stats.grad_norm}).setdefault(
                kind, {"mean": [], "largest": 0.0, "weights are the masters'": True}
            )
            entry["mean"].append(float(error.mean()))
            entry["largest"] = max(entry["largest"], float(error.max()))
            entry["weights are the masters'"] &= belongs(part.weight, part.read_master())
        optimizer.close()
        del optimizer
        free()
    for way in found.values():
        for entry in way.values():
            if isinstance(entry, dict):
                entry["mean"] = statistics.fmean(entry["mean"])
    return found


def matrices_of(m: int, n: int, count: int) -> Part:
    """Make random matrices in the middle of a training, for one launch."""
    generator = torch.Generator("cuda").manual_seed(m)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    fall = torch.logspace(0, -3, min(m, n), device="cuda")
    grad = (draw(count, m, min(m, n)) * fall) @ draw(count, min(m, n), n) / 100
    state = {
        "momentum_buffer": (grad * 0.5 + draw(count, m, n) * grad.std() * 0.1).bfloat16(),
        "second_momentum_buffer": torch.rand((count, m, 1), generator=generator, device="cuda") * 1e-3,
    }
    weight = (draw(count, m, n) * 0.02).bfloat16()
    low = torch.zeros_like(weight, dtype=torch.int16)
    return Part(
        0, "experts", Route("matrices", "normuon", True, 0.01, 0.1), 0, weight, grad, low, state, None, (m, n)
    )


def sweep(count: int) -> dict[str, Any]:
    """Time the kernel under several tilings, in nanoseconds a matrix."""
    found: dict[str, Any] = {}
    gate = torch.ones(2, device="cuda")
    rates = torch.tensor([[0.01, 0.999, 0.0, 0.0]], device="cuda")
    settings = OptimizerConfig(name="normuon", lr=0.01)
    for m, n in ((128, 1024), (1024, 128)):
        part = matrices_of(m, n, count)
        for tiling in SWEEP:
            try:
                small = SmallMatrices([part], {part.route: 0}, settings, COEFFICIENTS, tiling=tiling)
                ms = timed(partial(small.step, rates, gate))["device_ms"]
                found.setdefault(f"{m} x {n}", {})[str(tiling)] = round(1e6 * ms / count)
            except Exception as error:  # a tiling that does not fit the card is a result too
                found.setdefault(f"{m} x {n}", {})[str(tiling)] = f"{type(error).__name__}: {error}"[:200]
            print(m, n, tiling, found[f"{m} x {n}"][str(tiling)], flush=True)
    return found


def free() -> None:
    """Give back what is not used."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 80])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--matrices", type=int, default=4224, help="of each shape, for --sweep")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.check or options.sweep:
        if options.check:
            print(json.dumps(check(4), indent=1))
        if options.sweep:
            print(json.dumps(sweep(options.matrices), indent=1))
        return
    for layers in options.layers:
        found = {}
        for way in ("kernels", "batched"):
            found[way] = time_parts(layers, kernels=way == "kernels")
            free()
        print(json.dumps({layers: found}, indent=1), flush=True)
        if options.record:
            ours, theirs = (found[way]["step"]["device_ms"] for way in ("kernels", "batched"))
            record(
                f"optimizer.step.{layers}_layers",
                ours,
                "ms",
                comparator="the step without kernels, as other backends have it",
                ratio=theirs / ours,
                details=found,
            )


if __name__ == "__main__":
    main()
