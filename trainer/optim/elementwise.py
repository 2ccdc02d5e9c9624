"""Runs AdamW and SGD over all other tensors of this rank, equal settings together.

A model has thousands of vectors; lists of them share a handful of kernels. A list is cut so that its
temporaries stay within a fixed size.
"""

from collections.abc import Callable, Sequence

import torch

from trainer.contract.schema.training import OptimizerConfig
from trainer.optim.adamw import adamw_
from trainer.optim.parts import Part
from trainer.optim.routing import Route

#: A list holds at most this many elements, or one part that alone has more.
CHUNK_ELEMENTS = 1 << 26


def plan_elementwise(parts: Sequence[Part], *, chunk_elements: int = CHUNK_ELEMENTS) -> list[list[Part]]:
    """Put parts of one route together, in lists of a bounded number of elements."""
    chunks: dict[Route, list[list[Part]]] = {}
    sizes: dict[Route, int] = {}
    for part in parts:
        size = sizes.get(part.route, 0) + part.weight.numel()
        lists = chunks.setdefault(part.route, [])
        if not lists or size > chunk_elements:
            lists.append([])
            size = part.weight.numel()
        lists[-1].append(part)
        sizes[part.route] = size
    return [chunk for lists in chunks.values() for chunk in lists]


def step_elementwise(
    chunks: Sequence[Sequence[Part]],
    config: OptimizerConfig,
    *,
    rate: Callable[[Route], float],
    steps: int,
) -> None:
    """One step of the master weights of some lists of parts, in place.

    Args:
        chunks: Of `plan_elementwise`.
        config: Decays of the averages.
        rate: Learning rate of a route in this step.
        steps: Steps of the run, this one included.
    """
    for chunk in chunks:
        route = chunk[0].route
        lr = rate(route)
        masters, grads = [part.master for part in chunk], [part.grad for part in chunk]
        if route.algorithm == "sgd":
            torch._foreach_mul_(masters, 1 - lr * route.weight_decay)
            torch._foreach_add_(masters, grads, alpha=-lr)
            continue
        adamw_(
            masters,
            grads,
            [part.state["exp_avg"] for part in chunk],
            [part.state["exp_avg_sq"] for part in chunk],
            step=steps - route.frozen_steps,  # its averages are that old
            lr=lr,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            weight_decay=route.weight_decay,
        )
