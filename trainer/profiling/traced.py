"""What torch's profiler saw of one step, by kind of layer, by part of the step and by kernel.

An operation belongs to the innermost range around it. One of the backward pass belongs to the range of the
operation of the forward pass whose sequence number autograd gave it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from trainer.errors import ProfileError
from trainer.profiling.kinds import HEAD
from trainer.profiling.timeline import RANGE

GRADIENTS = "sums of gradients"
"""Where autograd hands a parameter its gradient: of no kind of layer."""
OTHER = "other"
BETWEEN = "between operations"
"""The host's own time on a CPU: Python, and autograd on its way from one operation to the next."""
MOST_KERNELS = 20
_NODE = "autograd::engine::evaluate_function: "
_PARTS = {"loss": HEAD}
"""Parts of a step that are a kind of layer."""
_BACKWARD = "backward"


@dataclass
class Spent:
    """Milliseconds of a kind of layer, or of another part of the step, in both directions."""

    forward_ms: float = 0.0
    backward_ms: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class Traced:
    """One step under the profiler.

    Attributes:
        kinds: Time of each kind of layer, and of what is none: kernels' on a GPU, operations' on a CPU.
        operations: Kernels and copies of the device in the step; None on a CPU.
        busy_ms: Their time together; None on a CPU.
        dearest: Those that took longest, by name, with time and number; on a CPU the operations that did.
    """

    kinds: dict[str, Spent] = field(default_factory=dict)
    operations: int | None = None
    busy_ms: float | None = None
    dearest: list[dict[str, Any]] = field(default_factory=list)


def trace(step: Callable[[], Any], device: torch.device, path: Path | None) -> Traced:
    """Run a step under torch's profiler.

    Args:
        step: Runs it, with the ranges of `told_apart` and `Ranges`.
        device: Where it runs.
        path: Where the raw trace goes, a `.json`; None keeps none.

    Raises:
        ProfileError: On a GPU, and no kernel was seen.
    """
    cuda = device.type == "cuda"
    # Not `torch.profiler.profile`, which loads the compiler to ask it something.
    device_name = "cuda" if cuda else None
    with torch.autograd.profiler.profile(use_device=device_name, use_kineto=cuda) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(path))
    events: Sequence[Any] = seen.function_events or ()
    host = [event for event in events if event.device_type == DeviceType.CPU]
    if not cuda:
        return Traced(spent(host, _on_cpu), None, None, _dearest(_named(host, _on_cpu)))
    # Ranges come back as one long event of the device each, which is no work of its own.
    device_side = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not device_side:
        raise ProfileError(
            "torch's profiler saw no kernel on the GPU in a training step: CUPTI cannot be used. Run without "
            "another profiler around (nsys, ncu), with permission to read counters, and with the CUPTI that "
            "this build of torch was made with"
        )
    busy = sum(event.device_time for event in device_side) / 1000
    table = _dearest((event.name, event.device_time / 1000) for event in device_side)
    return Traced(spent(host, _on_device), len(device_side), busy, table)


def _on_cpu(event: Any) -> float:
    return float(event.self_cpu_time_total) / 1000


def _on_device(event: Any) -> float:
    return sum(float(kernel.duration) for kernel in event.kernels) / 1000


def spent(events: Iterable[Any], own_ms: Callable[[Any], float]) -> dict[str, Spent]:
    """Share the time of operations out among kinds of layers.

    Args:
        events: Operations and ranges on the host, as torch's profiler has them, with their parents.
        own_ms: Milliseconds of an operation itself, without those inside it.
    """
    events = list(events)
    forward: dict[int, tuple[float, str]] = {}
    places: dict[int, tuple[str | None, Any]] = {}
    for event in events:
        range_, node = _around(event)
        places[id(event)] = range_, node
        if node is None and range_ is not None and event.sequence_nr >= 0:
            began = event.time_range.start
            # Operations that autograd does not follow have the number of the one that comes next.
            if event.sequence_nr not in forward or forward[event.sequence_nr][0] <= began:
                forward[event.sequence_nr] = began, range_
    found: dict[str, Spent] = {}
    for event in events:
        if not (ms := own_ms(event)):
            continue
        range_, node = places[id(event)]
        if node is not None:
            known = forward.get(node.sequence_nr)
            kind = known[1] if known else GRADIENTS if "AccumulateGrad" in node.name else OTHER
        else:
            kind = range_ or OTHER
        backward = node is not None or kind == _BACKWARD
        if kind in ("forward", _BACKWARD):
            kind = BETWEEN if event.name.startswith(RANGE) else OTHER
        kind = _PARTS.get(kind, kind)
        into = found.setdefault(kind, Spent())
        into.calls += 1
        if backward:
            into.backward_ms += ms
        else:
            into.forward_ms += ms
    return found


def _around(event: Any) -> tuple[str | None, Any]:
    """Return the innermost range around an operation, and the node of autograd's that it is part of."""
    range_, node, at = None, None, event
    while at is not None:
        if range_ is None and at.name.startswith(RANGE):
            range_ = at.name.removeprefix(RANGE)
        if at.name.startswith(_NODE):
            node = at
        at = at.cpu_parent
    return range_, node


def _named(events: Iterable[Any], own_ms: Callable[[Any], float]) -> Iterable[tuple[str, float]]:
    return ((event.name, own_ms(event)) for event in events if not event.name.startswith((RANGE, _NODE)))


def _dearest(timed: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for name, ms in timed:
        found.setdefault(name[:120], []).append(ms)
    ranked = sorted(found.items(), key=lambda pair: (-sum(pair[1]), pair[0]))[:MOST_KERNELS]
    return [{"name": name, "ms": round(sum(times), 4), "calls": len(times)} for name, times in ranked]
