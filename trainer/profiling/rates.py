"""What a device can do: its data sheet where it is known, and one large product and copy in this run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DENSE_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "B200": 2250e12,
}
"""Dense bf16 operations per second by a part of a card's name, of NVIDIA's data sheets; the first counts."""
_REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second.

    Attributes:
        flops_per_s: Of a product of two large square matrices in the run's type.
        bytes_per_s: Of a copy, read and written bytes together.
        sheet_flops_per_s: Dense bf16 by the data sheet; None where the device is not known, and on a CPU.
    """

    flops_per_s: float
    bytes_per_s: float
    sheet_flops_per_s: float | None


def sheet_flops(name: str) -> float | None:
    """Return what a card does by its data sheet in dense bf16, None for one that is not known here."""
    return next((flops for part, flops in DENSE_BF16_FLOPS.items() if part in name), None)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure what a device does; takes a gigabyte of a GPU for a moment, and a fraction of a second.

    Args:
        device: The device.
        dtype: Of the product.
    """
    cuda = device.type == "cuda"
    size, numbers = (8192, 1 << 28) if cuda else (768, 1 << 23)
    flops, moved = _product(size, dtype, device), _copy(numbers, device)
    if cuda:
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if cuda else ""
    return Rates(flops, moved, sheet_flops(name) if dtype == torch.bfloat16 else None)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    into = torch.empty_like(left)
    return 2 * size**3 / _median_s(lambda: torch.mm(left, right, out=into), device)


def _copy(numbers: int, device: torch.device) -> float:
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    into = torch.empty_like(source)
    return 4 * numbers / _median_s(lambda: into.copy_(source), device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
