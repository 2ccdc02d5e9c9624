"""A model whose gradients a test prescribes, whole or split, and a way to run it on several ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.ranks import run_ranks
from trainer.contract.schema.training import OptimizerConfig
from trainer.optim.optimizer import Optimizer
from trainer.optim.routing import Routed
from trainer.optim.sharded_state import state_tensors
from trainer.optim.topology import Topology

EXPERTS = 4


@dataclass(frozen=True)
class Spec:
    """One parameter of the whole model."""

    shape: tuple[int, ...]
    marks: dict[str, Any] = field(default_factory=dict)
    tensor_dim: int | None = None
    expert: bool = False


TABLE = {"is_embedding_or_output_parameter": True}
SPECS = {
    "embedding": Spec((50, 8), TABLE, tensor_dim=0),
    "qkv": Spec((12, 8), tensor_dim=0),
    "qkv_bias": Spec((12,), tensor_dim=0),
    "norm": Spec((8,)),
    "proj": Spec((8, 12), tensor_dim=1),
    "tpa": Spec((4, 8)),
    "tpa_other_layer": Spec((4, 8)),
    "omega": Spec((), {"keep_fp32": True}),
    "log_freq": Spec((3, 4), {"keep_fp32": True, "adamw_only": True}),
    "router": Spec((EXPERTS, 8)),
    "weight1": Spec((EXPERTS, 6, 8), {"matrix_batch": True}, expert=True),
    "bias1": Spec((EXPERTS, 6), {"vector_batch": True}, expert=True),
    "weight2": Spec((EXPERTS, 8, 6), {"matrix_batch": True}, expert=True),
    "head": Spec((50, 8), TABLE, tensor_dim=0),
}


def whole(name: str, seed: int) -> torch.Tensor:
    """A tensor of one parameter's whole shape, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1000 + list(SPECS).index(name))
    return torch.randn(SPECS[name].shape, generator=generator)


def piece(name: str, tensor: torch.Tensor, topology: Topology, ep: tuple[int, int]) -> torch.Tensor:
    """This rank's piece of a whole tensor."""
    spec = SPECS[name]
    if spec.expert:
        return tensor.chunk(ep[1], 0)[ep[0]].clone()
    if spec.tensor_dim is not None:
        return tensor.chunk(topology.tensor.size, spec.tensor_dim)[topology.tensor.rank].clone()
    return tensor.clone()


class PrescribedGradients(torch.nn.Module):
    """Parameters of `SPECS`; the gradient of its loss is whatever the test passes in."""

    def __init__(
        self,
        topology: Topology | None = None,
        ep: tuple[int, int] = (0, 1),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.topology = topology or Topology()
        self.ep = ep
        for name, spec in SPECS.items():
            value = piece(name, whole(name, seed), self.topology, ep) * 0.1
            kept = spec.marks.get("keep_fp32", False)
            param = torch.nn.Parameter(value if kept else value.to(dtype))
            for mark, flag in spec.marks.items():
                setattr(param, mark, flag)
            if spec.expert:
                param.allreduce = False
            if spec.tensor_dim is not None:
                param.tensor_model_parallel = True
                param.partition_dim = spec.tensor_dim
            self.register_parameter(name, param)

    def backward(
        self, step: int, *, micro_batches: int = 2, scale: float = 1.0, skip: tuple[str, ...] = ()
    ) -> None:
        """Leaves the whole model's gradient of `step`, split over micro-batches and ranks."""
        for micro in range(micro_batches):
            loss = torch.zeros((), device=self.omega.device)
            for name, param in self.named_parameters():
                if name in skip or not param.requires_grad:
                    continue
                data = self.topology.expert_data if SPECS[name].expert else self.topology.data
                part = _fraction(micro, micro_batches) * _fraction(data.rank, data.size) * scale
                gradient = piece(name, whole(name, 100 + step), self.topology, self.ep)
                gradient = gradient.to(param.device)
                loss = loss + (param.float() * (gradient * part)).sum()
            loss.backward()

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        sharded = {}
        for name, param in self.named_parameters():
            spec = SPECS[name]
            offsets = []
            replica: tuple[int, ...] = (self.topology.tensor.rank, self.topology.data.rank)
            if spec.expert:
                offsets = [(0, *self.ep)]
                replica = (0, self.topology.expert_data.rank)
            elif spec.tensor_dim is not None:
                offsets = [(spec.tensor_dim, self.topology.tensor.rank, self.topology.tensor.size)]
                replica = (0, self.topology.data.rank)
            sharded[name] = ShardedTensor.from_rank_offsets(
                f"model.{name}", param, *offsets, replica_id=replica
            )
        return sharded


def _fraction(index: int, count: int) -> float:
    """1/2, 1/4, …, and the last one twice: they add up to one without rounding."""
    return 2.0 ** -min(index + 1, count - 1)


def settings(**changes: Any) -> OptimizerConfig:
    values: dict[str, Any] = {"name": "normuon", "lr": 2e-2, "normuon_aux_lr": 3e-3, "decoupled_lr": 3e-2}
    return OptimizerConfig(**{**values, **changes})


def train(model: PrescribedGradients, optimizer: Optimizer, steps: range, **backward: Any) -> list[Any]:
    stats = []
    for step in steps:
        optimizer.zero_grad()
        model.backward(step, **backward)
        stats.append(optimizer.step(1.0 / (step + 1)))
    return stats


def count_matrices(routed: Iterable[Routed]) -> int:
    """Matrices that NorMuon treats, each expert's counted on its own."""
    shapes = [entry.param.shape for entry in routed if entry.route.algorithm == "normuon"]
    return sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of one rank's master weights and optimizer state, without gradients."""
    return sum(tensor.nbytes for part in optimizer._parts for _, tensor in state_tensors(part))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Rank:
    """What a function run on several ranks gets."""

    rank: int
    world: int
    directory: Path
    topology: Topology
    ep: tuple[int, int]


def _enter(tp: int, ep: int, directory: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    own_ep = (parallel_state.get_expert_model_parallel_rank(), ep)
    result = work(
        Rank(dist.get_rank(), dist.get_world_size(), directory, Topology.current(), own_ep), *arguments
    )
    dist.barrier()
    dist.destroy_process_group()
    return result


def on_ranks(
    directory: Path, work: Callable[..., Any], *arguments: Any, world: int, tp: int = 1, ep: int = 1
) -> list[Any]:
    """Runs `work(Rank, *arguments)` on `world` gloo ranks and returns their results."""
    directory.mkdir(parents=True)
    return run_ranks(world, _enter, tp, ep, directory, work, *arguments)
