"""Tables of addresses, by which one kernel works on many tensors."""

from collections.abc import Sequence

import torch

CHUNK = 4096
"""Elements that one program works on at a time."""
_BYTES, _ELEMENTS = 16, 16


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether tensors can be read 16 bytes at a time, from first to last."""
    return all(tensor.data_ptr() % _BYTES == 0 and tensor.numel() % _ELEMENTS == 0 for tensor in tensors)


def table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Return rows of numbers (addresses, places, lengths) as int64 on a device."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def chunks(lengths: Sequence[int], device: torch.device, *, size: int = CHUNK) -> torch.Tensor:
    """Cut tensors into chunks.

    Args:
        lengths: Of the tensors.
        device: Where the result is to be.
        size: Elements of a chunk; the last one of a tensor may be shorter.

    Returns:
        int32 `[chunks, 2]`: tensor, and number of the chunk in it.
    """
    counts = torch.tensor([-(-length // size) for length in lengths], dtype=torch.int64)
    tensors = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    numbers = torch.arange(len(tensors)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack((tensors, numbers), dim=1).to(device, torch.int32)
