"""The time of each part of a step, by the device's own clock, and NVTX ranges of the same names."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

RANGE = "vpmoe: "
"""How the names of ranges begin, so that they are told from others in a trace."""
REST = "rest"
"""What of a step comes before its first part."""

GROUPS = {
    "data": "data",
    "clearing of gradients": "backward",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "sum of gradients over ranks": "comm",
    "gradient norm": "optimizer",
    "clipping": "optimizer",
    "NorMuon, small matrices": "optimizer",
    "NorMuon, matrices": "optimizer",
    "AdamW": "optimizer",
    "weights from masters": "optimizer",
    "exchange of weights": "comm",
}
"""What a part of a step counts to; parts that are not here are the rest."""


class Timeline:
    """Takes the marks of steps, and the time between them.

    On a GPU an event is recorded in the stream at each mark, so a part lasts as long on the device, waiting
    for the host included; nothing is waited for before the step has ended. On a CPU it is the host's clock.

    Args:
        device: Of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | int]] = []
        self._listening = False

    def mark(self, part: str) -> None:
        """Begin a part of a step."""
        if not self._listening:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            torch.cuda.nvtx.range_pop()
            torch.cuda.nvtx.range_push(RANGE + part)
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter_ns()))

    @contextmanager
    def step(self, into: dict[str, float]) -> Iterator[None]:
        """Time the step in the block.

        Args:
            into: Gets the milliseconds of each part, those of a part that comes several times added up.
        """
        self._marks.clear()
        self._listening = True
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(RANGE + "step")
            torch.cuda.nvtx.range_push(RANGE + REST)
        self.mark(REST)
        try:
            yield
            self.mark(REST)
        finally:
            self._listening = False
            if self._cuda:
                torch.cuda.synchronize()
                torch.cuda.nvtx.range_pop()
                torch.cuda.nvtx.range_pop()
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            into[part] = into.get(part, 0.0) + _elapsed_ms(start, stop)


def _elapsed_ms(start: torch.cuda.Event | int, stop: torch.cuda.Event | int) -> float:
    if isinstance(start, int) or isinstance(stop, int):
        assert isinstance(start, int)
        assert isinstance(stop, int)
        return (stop - start) / 1e6
    return float(start.elapsed_time(stop))


def grouped(parts: dict[str, float]) -> dict[str, float]:
    """Return the milliseconds of a step by the groups of `GROUPS`, every group there, and of the rest."""
    found = dict.fromkeys((*dict.fromkeys(GROUPS.values()), REST), 0.0)
    for part, ms in parts.items():
        found[GROUPS.get(part, REST)] += ms
    return found


class Ranges:
    """Takes the marks of a step as ranges of torch's profiler, by which its operations are told apart."""

    def __init__(self) -> None:
        self._open: torch.profiler.record_function | None = None

    def mark(self, part: str) -> None:
        """Begin a part of a step."""
        self.close()
        self._open = torch.profiler.record_function(RANGE + part)
        self._open.__enter__()

    def close(self) -> None:
        """End the last part."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
