"""Leaving chains of small operations to torch's compiler, where a backend asks for it."""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch._functorch.config


class Fuse(Protocol):
    """Takes a function of tensors, of the module level and without state, for one that is perhaps faster."""

    def __call__[**P, R](self, function: Callable[P, R], /) -> Callable[P, R]:
        """Return a function of the same results."""
        ...


@cache
def fused[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors, once for each combination of shapes; every use shares it.

    Only for passes whose shapes do not vary: after a few shapes the compiler gives up and runs the function
    as it is, without an error.

    Args:
        function: Of the module level, without state.
    """
    # A step of several micro-batches captures two ways back through one pass forward, so that what a compiled
    # backward pass was given must be there for the second.
    torch._functorch.config.donated_buffer = False
    return cast(
        Callable[P, R], torch.compile(cast(Callable[..., Any], function), dynamic=False, fullgraph=True)
    )


def unfused[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as it is."""
    return function
