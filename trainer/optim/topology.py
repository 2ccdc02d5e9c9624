"""The process groups the optimizer talks over, and its few collectives."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Group:
    """One process group as seen from this rank; `handle` is None where the rank is alone.

    Attributes:
        size: Number of ranks.
        rank: This rank's place among them.
        handle: The torch.distributed group.
    """

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, handle: dist.ProcessGroup) -> "Group":
        """Describe a torch.distributed group this rank belongs to."""
        size = dist.get_world_size(handle)
        return cls(size, dist.get_rank(handle), handle if size > 1 else None)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over the group, in place."""
        if self.handle is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.handle)

    def max_(self, tensor: torch.Tensor) -> None:
        """Take the maximum of a tensor over the group, in place."""
        if self.handle is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.handle)

    def min_(self, tensor: torch.Tensor) -> None:
        """Take the minimum of a tensor over the group, in place."""
        if self.handle is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.handle)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's equally shaped tensor along `dim`, in rank order."""
        if self.handle is None:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.handle)
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class Topology:
    """The groups of a run.

    Attributes:
        world: All ranks.
        data: Ranks that hold the same dense parameters and see different samples.
        expert_data: Ranks that hold the same experts.
        tensor: Ranks among which one layer's matrices are split.
    """

    world: Group = Group()
    data: Group = Group()
    expert_data: Group = Group()
    tensor: Group = Group()

    @classmethod
    def current(cls) -> "Topology":
        """Read Megatron's parallel state; a single process without one stands alone.

        Raises:
            RuntimeError: torch.distributed runs with several ranks but Megatron's parallel state is missing.
        """
        if not parallel_state.is_initialized():
            if dist.is_initialized() and dist.get_world_size() > 1:
                raise RuntimeError(
                    f"torch.distributed has {dist.get_world_size()} ranks but Megatron's parallel state is "
                    "not "
                    f"initialised; call megatron.core.parallel_state.initialize_model_parallel first."
                )
            return cls()
        world = dist.group.WORLD
        if world is None:
            raise RuntimeError("Megatron's parallel state outlived torch.distributed: destroy both together.")
        if parallel_state.get_pipeline_model_parallel_world_size() != 1:
            raise RuntimeError(
                f"pipeline parallel size {parallel_state.get_pipeline_model_parallel_world_size()}: only 1 "
                "works."
            )
        return cls(
            world=Group.of(world),
            data=Group.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            expert_data=Group.of(parallel_state.get_expert_data_parallel_group()),
            tensor=Group.of(parallel_state.get_tensor_model_parallel_group()),
        )
