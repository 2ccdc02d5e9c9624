"""Process groups, devices, seeds and random states: the same calls on a CPU (gloo) and on GPUs (NCCL).

Started by torchrun the job has `WORLD_SIZE` ranks; started plainly it is alone. Tensor and expert parallel
groups come from Megatron's parallel state. Pipeline size is 1: value residual hands layer 1's values to
every later layer.
"""

import base64
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

DeviceKind = Literal["cpu", "cuda"]


class LayoutError(ValueError):
    """The asked-for parallel layout does not fit the processes or devices that are there."""


@dataclass(frozen=True)
class Layout:
    """Where this process stands.

    Attributes:
        rank: Global rank.
        world: Number of ranks; `world == dp * tp`.
        tp: Tensor-parallel size.
        ep: Expert-parallel size; divides `dp` (experts are spread over data-parallel ranks).
        dp: Data-parallel size.
        device: Device of this rank's tensors.
    """

    rank: int
    world: int
    tp: int
    ep: int
    dp: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Index within the data-parallel group."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same dense parameters and see different samples."""
        return parallel_state.get_data_parallel_group()

    def describe(self) -> dict[str, int]:
        """Return the layout as plain numbers, as stored with a checkpoint."""
        return {"world": self.world, "dp": self.dp, "tp": self.tp, "ep": self.ep, "pp": 1}


@contextmanager
def session(
    device: DeviceKind = "cpu", *, tp: int = 1, ep: int = 1, dp: int | None = None, timeout_s: float = 1800.0
) -> Iterator[Layout]:
    """Initialise torch.distributed and Megatron's parallel state, and take both down afterwards.

    Args:
        device: `cpu` (gloo) or `cuda` (NCCL, with gloo beside it for what lies on the CPU).
        tp: Tensor-parallel size.
        ep: Expert-parallel size.
        dp: Data-parallel size; None takes what `WORLD_SIZE` leaves.
        timeout_s: How long a collective waits for a missing rank before the job fails, in seconds.

    Yields:
        The layout of this rank.

    Raises:
        LayoutError: Sizes and world do not fit, or CUDA was asked for and is not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _check(world, tp, ep, dp)
    where = _device(device, local_rank)
    use_threads(local_world)
    make_deterministic(where)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    wait = timedelta(seconds=timeout_s)
    if world == 1:
        # A store inside the process: no port to choose, none to clash with another job on the machine.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=wait)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            # Biased experts cannot be split by columns, and 128-wide experts need not be.
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, int(timeout_s // 60)),
            create_gloo_process_groups=False,
        )
        yield Layout(rank, world, tp, ep, world // tp, where)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _check(world: int, tp: int, ep: int, dp: int | None) -> None:
    for name, size in (("tp", tp), ("ep", ep), ("dp", 1 if dp is None else dp)):
        if size < 1:
            raise LayoutError(f"{name} = {size}: parallel sizes start at 1")
    if world % tp:
        raise LayoutError(f"{world} processes cannot be divided into tensor-parallel groups of {tp}")
    found = world // tp
    if dp is not None and dp != found:
        raise LayoutError(
            f"dp = {dp} with tp = {tp} needs {dp * tp} processes and {world} were started; "
            f"set nproc = {dp * tp} or dp = {found}"
        )
    if found % ep:
        raise LayoutError(
            f"ep = {ep} must divide the data-parallel size {found}: experts are spread over those ranks"
        )


def _device(device: DeviceKind, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LayoutError(
            "device = 'cuda' was asked for and torch finds no GPU; set device = 'cpu' or use a GPU machine"
        )
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible; "
            "start fewer processes or widen CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def use_threads(local_world: int) -> None:
    """Share the usable cores among the ranks of the machine, unless OMP_NUM_THREADS says otherwise.

    Args:
        local_world: Number of ranks on this machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def make_deterministic(device: torch.device) -> None:
    """Ask torch for kernels that give the same bits each time, which resuming bit for bit rests on.

    On a GPU an operation that has no such kernel warns instead of failing: the data order and the state are
    strict, kernels are best effort.

    Args:
        device: Device of this rank.
    """
    if device.type == "cuda":
        # cuBLAS reads this when its handle is made; without it its split-k sums may change order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    # Not `use_deterministic_algorithms`: it loads the compiler to tell it too, a second of every start.
    torch.set_deterministic_debug_mode("warn")
    # That mode also writes NaN into every fresh tensor, a tenth of a step's time, against reads of memory
    # that nobody wrote. No result here depends on such memory: the resume check would find it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed python, numpy, torch and Megatron's tracker, each data-parallel rank on a stream of its own.

    Megatron's tracker reads CUDA's random state even on a machine without one, unless it is the inference
    tracker, whose `fork` does nothing. The model draws its initial weights from its own generators, so on a
    CPU nothing is lost.

    Args:
        seed: The experiment's seed.
        device: Device of this rank.
    """
    own = seed + 1009 * int(parallel_state.get_data_parallel_rank())
    random.seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002 - other libraries draw from the legacy global state
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=device.type == "cpu", force_reset_rng=True
    )


def _bytes(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def random_state(device: torch.device) -> dict[str, Any]:
    """All random states of this rank as JSON values: python, numpy, torch CPU and CUDA, Megatron's tracker.

    JSON rather than a pickle, so that reading a checkpoint never runs code.

    Args:
        device: Device of this rank.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch_cpu": _bytes(torch.get_rng_state()),
        "torch_cuda": None,
        "megatron": {},
    }
    if device.type == "cuda":
        state["torch_cuda"] = _bytes(torch.cuda.get_rng_state(device))
        state["megatron"] = {
            name: _bytes(value) for name, value in get_cuda_rng_tracker().get_states().items()
        }
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned.

    Args:
        state: The stored states of this rank.
        device: Device of this rank.

    Raises:
        ValueError: The states were taken on another kind of device.
    """
    stored = "cuda" if state["torch_cuda"] is not None else "cpu"
    if stored != device.type:
        raise ValueError(f"random states stored on {stored} cannot be put back on {device.type}")
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_tensor(state["torch_cpu"]))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["torch_cuda"]), device)
        get_cuda_rng_tracker().set_states({name: _tensor(text) for name, text in state["megatron"].items()})


def agree(flag: bool) -> bool:
    """Return True on every rank as soon as it is true on one.

    Travels over the CPU (gloo), so that asking each step costs a GPU no synchronisation.

    Args:
        flag: This rank's opinion.
    """
    if dist.get_world_size() == 1:
        return flag
    vote = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def peak_device_bytes(device: torch.device) -> int | None:
    """Return the most memory that a rank's allocator held at once, the largest of all ranks; None on a CPU.

    Collective. What the driver and NCCL take beside the allocator is not in it.
    """
    if device.type != "cuda":
        return None
    held = torch.tensor([torch.cuda.max_memory_reserved(device)], dtype=torch.int64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held.item())


def together[T](work: Callable[[], T], *, only_leader: bool = True) -> T | None:
    """Run `work` on rank 0 (or on all ranks) and raise on every rank when it failed on one.

    Without this, a rank that fails alone (a full disk) leaves the others waiting in the next collective.

    Args:
        work: What to run.
        only_leader: Whether rank 0 alone runs it.

    Returns:
        The result where it ran, else None.

    Raises:
        RuntimeError: Another rank failed; the failing rank raises its own exception.
    """
    error: Exception | None = None
    result: T | None = None
    if not only_leader or dist.get_rank() == 0:
        try:
            result = work()
        except Exception as caught:  # re-raised below, after the other ranks know
            error = caught
    failed = agree(error is not None)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another rank failed; its log says why")
    return result
