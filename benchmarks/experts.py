"""Routed experts of one layer, forward and backward: our kernels beside torch's grouped products, on a GPU.

    python -m benchmarks.experts [--tokens 2048] [--record]
    python -m benchmarks.experts --each              # every kernel alone, over blocks, warps and stages

256 experts of 128 × 1024 with four a token. Both are captured in a CUDA graph, the products of torch with the
steps between them one operation after another and with the copy of bf16 gradients into fp32 `main_grad` that
they need. Medians of both in the same process, alternating; gradients are compared first.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import record
from trainer.model import grouped_products
from trainer.model.fusing import fused
from trainer.model.grouped_experts import _GroupedFFN, combine, gather
from trainer.model.grouped_products import Experts, Gathered, KernelFFN
from trainer.model.pair_sort import SortedPairs, sort_pairs
from trainer.model.parameters import take_written

EXPERTS, HIDDEN, WIDTH, TOPK = 256, 1024, 128, 4


class Layer:
    """Parameters and inputs of one layer.

    Args:
        tokens: How many.
    """

    def __init__(self, tokens: int) -> None:
        made = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=made, device="cuda") * 0.02).bfloat16()

        shapes = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN)
        self.held = Experts(*(torch.nn.Parameter(random(*shape)) for shape in shapes))
        for parameter in self.parameters:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        self.hidden = (random(tokens, HIDDEN) * 50).requires_grad_()
        self.weights = torch.rand(tokens, TOPK, generator=made, device="cuda").requires_grad_()
        chosen = torch.rand(tokens, EXPERTS, generator=made, device="cuda").topk(TOPK).indices
        self.pairs: SortedPairs = sort_pairs(chosen.flatten(), EXPERTS)
        self.grad = random(tokens, HIDDEN)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Weights and biases."""
        return [parameter for parameter in self.held if isinstance(parameter, torch.nn.Parameter)]

    def by_torch(self) -> None:
        """Forward, backward, and gradients copied to `main_grad`."""
        out = _GroupedFFN.apply(self.hidden, self.weights, self.pairs, *self.held)
        out.backward(self.grad)
        for parameter in self.parameters:
            parameter.main_grad.copy_(parameter.grad)  # type: ignore[attr-defined]
            parameter.grad = None

    def by_kernels(self) -> None:
        """Forward and backward; gradients of experts are written where the optimizer reads them."""
        sums = fused(combine), fused(gather)
        out = KernelFFN.apply(*sums, self.hidden, self.weights, self.pairs, *self.held)
        out.backward(self.grad)
        for parameter in self.parameters:
            take_written(parameter)

    def gradients(self, run: Callable[[], None]) -> list[torch.Tensor]:
        """Run once; return the gradients of everything."""
        self.hidden.grad = self.weights.grad = None
        run()
        held = [parameter.main_grad.clone() for parameter in self.parameters]  # type: ignore[attr-defined]
        assert self.hidden.grad is not None
        assert self.weights.grad is not None
        return [self.hidden.grad.float(), self.weights.grad.float(), *held]


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return a replay of a run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], Any], times: int = 20) -> float:
    """Return the median of some runs, by events of the device."""
    run()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def alone(run: Callable[[], Any]) -> float:
    """Return microseconds of a kernel, of many in a graph: launched one by one the host would be timed."""

    def many() -> None:
        for _ in range(8):
            run()

    return round(milliseconds(captured(many), 5) * 1000 / 8, 1)


def each_kernel(layer: Layer) -> dict[str, Any]:
    """Time every kernel alone over its settings; return the best few of each."""
    held, pairs, weights = layer.held, layer.pairs, layer.weights.detach()
    hidden = layer.hidden.detach()
    with torch.no_grad():
        inner, weighted = grouped_products.inner_rows(hidden, weights, held, pairs)
        runs = {
            "inner_rows": lambda: grouped_products.inner_rows(hidden, weights, held, pairs),
            "outer_rows": lambda: grouped_products.outer_rows(
                weighted, held.weight2, pairs, transposed=False
            ),
            "inner_gradients": lambda: grouped_products.inner_gradients(
                layer.grad, inner, weights, held, pairs
            ),
            "outer_rows_transposed": lambda: grouped_products.outer_rows(
                weighted, held.weight1, pairs, transposed=True
            ),
        }
        before = grouped_products._shape
        table: dict[str, Any] = {}
        for name, run in runs.items():
            rows = []
            for size, columns, depth, warps, stages in itertools.product(
                (32, 64, 128), (64, 128), (64,), (4, 8), (2, 3, 4)
            ):
                shape = {"ROWS": size, "COLUMNS": columns, "DEPTH": depth}
                shape |= {"num_warps": warps, "num_stages": stages}
                grouped_products._shape = lambda *_, shape=shape: shape
                try:
                    rows.append((alone(run), str(shape)))
                except Exception as error:
                    rows.append((1e9, f"{shape}: {type(error).__name__}"))
            table[name] = sorted(rows)[:6]
            print(name, *table[name], sep="\n  ", flush=True)
        grouped_products._shape = before
        for name, left, right, of in (
            ("weight1", Gathered(inner, 0), Gathered(hidden, TOPK), (held.weight1, held.bias1, None)),
            (
                "weight2",
                Gathered(layer.grad, TOPK),
                Gathered(weighted, 0),
                (held.weight2, held.bias2, weights),
            ),
        ):
            rows = []
            before_outer = grouped_products._outer_shape
            for size, block, warps, stages in itertools.product((16, 32, 64), (64, 128), (4, 8), (1, 2, 3)):
                shape = {"ROWS": size, "num_warps": warps, "num_stages": stages}
                grouped_products._outer_shape = lambda *_, shape=shape: shape
                grouped_products._COLUMNS = block
                weight, bias, p = of

                def run(
                    left: Any = left, right: Any = right, weight: Any = weight, bias: Any = bias, p: Any = p
                ) -> None:
                    grouped_products.weight_gradients(left, right, weight, bias, pairs, weights=p)
                    take_written(weight), take_written(bias)

                try:
                    rows.append((alone(run), f"{shape} block {block}"))
                except Exception as error:
                    rows.append((1e9, f"{shape}: {type(error).__name__}"))
            grouped_products._outer_shape, grouped_products._COLUMNS = before_outer, 128
            table[name] = sorted(rows)[:6]
            print(name, *table[name], sep="\n  ", flush=True)
    return table


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    layer = Layer(options.tokens)
    expected, found = layer.gradients(layer.by_torch), layer.gradients(layer.by_kernels)
    names = ("tokens", "weights", "weight1", "bias1", "weight2", "bias2")
    apart = {
        name: round(float((seen - wanted).norm() / wanted.norm()), 5)
        for name, seen, wanted in zip(names, found, expected, strict=True)
    }
    print("relative difference of gradients", json.dumps(apart), flush=True)
    if max(apart.values()) > 2e-2:
        raise SystemExit("the kernels' gradients are not those of torch's products")
    if options.each:
        each_kernel(layer)
        return
    layer.hidden.grad = layer.weights.grad = None
    runs = {"torch": captured(layer.by_torch), "kernels": captured(layer.by_kernels)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    median = {name: round(statistics.median(found), 4) for name, found in times.items()}
    details = {**median, "ratio": round(median["torch"] / median["kernels"], 2), "apart": apart}
    print(json.dumps({"tokens": options.tokens, **details}))
    if options.record:
        record(
            f"experts.{options.tokens}_tokens",
            median["kernels"],
            "ms",
            comparator="torch grouped_mm",
            ratio=median["torch"] / median["kernels"],
            details=details,
        )


if __name__ == "__main__":
    main()
