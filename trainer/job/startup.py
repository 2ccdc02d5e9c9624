"""Loading Megatron in a process that runs one job."""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

_WANDB = "wandb"


def wait_passively() -> None:
    """Let OpenMP's threads wait without spinning, unless the environment says otherwise: before torch loads.

    They spin at the end of every parallel region by default, which on a machine with other work to do makes a
    step ten times slower; waiting passively costs nothing measurable.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load_megatron() -> None:
    """Import megatron-core without loading the compiler.

    megatron decorates its fused helpers (bias and activation, bias and dropout) with `torch.compile` when it
    is imported. That alone loads Dynamo and Inductor, a good part of a job's start-up, for functions that
    the `reference` backend never calls. Here they stay plain functions; whatever this trainer compiles itself
    is not affected.

    The garbage collector waits meanwhile: what is imported stays, and looking through all of it again and
    again takes a quarter of the time. Frozen, no later collection looks at it either.

    megatron imports the SDK of Weights & Biases where there is one, for timers that nobody writes here. It is
    not there for that long; a job that logs to it imports it itself.
    """
    if "megatron.core" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch

        namespace: Any = torch
        real, namespace.compile = namespace.compile, _uncompiled
        hidden = _WANDB not in sys.modules
        modules: dict[str, Any] = sys.modules
        if hidden:
            modules[_WANDB] = None  # the import system's word for a module that is not there
        try:
            import megatron.core  # noqa: F401
        finally:
            namespace.compile = real
            if hidden:
                del modules[_WANDB]
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`torch.compile` as a decorator, with or without arguments, that leaves the function as it is."""
    return function if function is not None else lambda decorated: decorated
