"""NorMuon of the experts' matrices on one GPU: the kernel against the batched path, in time and in error.

    python -m benchmarks.optimizer_step [--matrices 4096] [--record]

Both update the same random matrices of 128 × 1024 and 1024 × 128 (gradients with a spectrum that falls by
three decades, momentum in bf16) from the same state. Errors are of the update, relative in Frobenius norm,
against the batched path with products in float32; the same path in bf16 stands beside as the measure of what
bf16 costs anyway. Times are medians of five steps.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import record
from trainer.optim.matrices import plan_matrices, step_matrices
from trainer.optim.parts import Part
from trainer.optim.polar_express import COEFFICIENTS, SAFETY_FACTOR, polar_express
from trainer.optim.routing import Route
from trainer.optim.small_matrices import SmallMatrices
from trainer.optim.topology import Group

ROUTE = Route("matrices", "normuon", False, 0.01, 0.1)
MU, BETA2, EPS = 0.95, 0.95, 1e-10


def part_of(m: int, n: int, matrices: int, seed: int) -> Part:
    """Make random matrices in the middle of a training."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    fall = torch.logspace(0, -3, min(m, n), device="cuda")
    left, right = draw(matrices, m, min(m, n)), draw(matrices, min(m, n), n)
    grad = (left * fall) @ right / 100
    master = draw(matrices, m, n) * 0.02
    state = {
        "momentum_buffer": (grad * 0.5 + draw(matrices, m, n) * grad.std() * 0.1).bfloat16(),
        "second_momentum_buffer": torch.rand((matrices, m, 1), generator=generator, device="cuda") * 1e-3,
    }
    return Part(0, "experts", ROUTE, 0, master.bfloat16(), grad, master, state, None, (m, n))


def copy_of(part: Part) -> Part:
    """Copy a part, so that it can be updated twice."""
    state = {name: tensor.clone() for name, tensor in part.state.items()}
    return Part(
        0, "", ROUTE, 0, part.weight.clone(), part.grad, part.master.clone(), state, None, part.matrix
    )


def batched(part: Part, dtype: torch.dtype) -> Callable[[], None]:
    """Return the step of the batched path."""
    plan = plan_matrices([part], Group())

    def step() -> None:
        step_matrices(
            plan,
            rate=lambda route: route.lr,
            mu=MU,
            beta2=BETA2,
            eps=EPS,
            orthogonalize=lambda x: polar_express(x, dtype=dtype),
            tensor_group=Group(),
        )
        part.weight.copy_(part.master)

    return step


def kernel(part: Part) -> Callable[[], None]:
    """Return the step of the kernel."""
    small = SmallMatrices([part], COEFFICIENTS, SAFETY_FACTOR)
    return lambda: small.step(rate=lambda route: route.lr, clip_scale=1.0, mu=MU, beta2=BETA2, eps=EPS)


def median_ms(step: Callable[[], None], repeats: int = 5) -> float:
    """Return the median time of a step on the device."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(m: int, n: int, matrices: int) -> dict[str, Any]:
    """Compare the two on matrices of one shape."""
    start = part_of(m, n, matrices, seed=m)
    exact, today, ours = copy_of(start), copy_of(start), copy_of(start)
    batched(exact, torch.float32)()
    steps = {"batched": batched(today, torch.bfloat16), "kernel": kernel(ours)}
    errors = {}
    update = exact.master - start.master
    for name, part in (("batched", today), ("kernel", ours)):
        steps[name]()
        torch.cuda.synchronize()
        each = (part.master - exact.master).norm(dim=(1, 2)) / update.norm(dim=(1, 2))
        statistic = part.state["second_momentum_buffer"] / exact.state["second_momentum_buffer"] - 1
        errors[name] = {
            "update, mean": float(each.mean()),
            "update, largest": float(each.max()),
            "row statistic, largest": float(statistic.abs().max()),
            "momentum equal": bool(
                torch.equal(part.state["momentum_buffer"], exact.state["momentum_buffer"])
            ),
            "weights are the masters'": bool(torch.equal(part.weight, part.master.bfloat16())),
        }
    return {"errors": errors, "ms": {name: round(median_ms(step), 3) for name, step in steps.items()}}


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--matrices", type=int, default=4096)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    found = {f"{m} x {n}": measure(m, n, options.matrices) for m, n in ((128, 1024), (1024, 128))}
    print(json.dumps(found, indent=1))
    if options.record:
        ms = {name: sum(shape["ms"][name] for shape in found.values()) for name in ("batched", "kernel")}
        record(
            "optimizer.normuon.experts",
            1e6 * ms["kernel"] / (2 * options.matrices),
            "ns/matrix",
            comparator="the batched path of trainer.optim.matrices",
            ratio=ms["batched"] / ms["kernel"],
            details=found,
        )


if __name__ == "__main__":
    main()
