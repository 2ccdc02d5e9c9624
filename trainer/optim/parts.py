"""The parts of parameters that this rank updates, with their master weights and optimizer state."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from trainer.contract.partition import Share, Unit, elementwise_unit, matrix_unit, plan
from trainer.errors import OptimizerError
from trainer.optim.low_halves import join, split
from trainer.optim.routing import Route, Routed
from trainer.optim.topology import Topology


@dataclass
class Part:
    """A contiguous range of one parameter's leading axis (or all of it), updated by this rank.

    Attributes:
        index: Position of the parameter in the model.
        name: Its name.
        route: Its algorithm, rate and decay.
        start: First row of the leading axis, 0 where the parameter is not split.
        weight: View into the parameter, in the model's type.
        grad: View into the main gradient, float32.
        master: float32 weight; the same tensor as `weight` where the parameter is float32 already. Or its low
            half, int16, where `weight` has all the rest: see `trainer.optim.low_halves`.
        state: State tensors by name, in the shape that a checkpoint stores.
        tensor_dim: Matrix axis that tensor parallelism splits (0 rows, 1 columns), None where it does not.
        matrix: `(m, n)` of the local matrices, for NorMuon.
    """

    index: int
    name: str
    route: Route
    start: int
    weight: torch.Tensor
    grad: torch.Tensor
    master: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    tensor_dim: int | None = None
    matrix: tuple[int, int] = (1, 1)

    def batched(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a NorMuon tensor of this part as a batch `[k, m, ·]`."""
        return tensor.view(-1, self.matrix[0], tensor.size(-1))

    @property
    def keeps_master(self) -> bool:
        """Whether the master weight is a tensor of its own."""
        return self.master is not self.weight

    @property
    def low_half(self) -> bool:
        """Whether the master weight is kept as its low half."""
        return self.master.dtype == torch.int16

    def read_master(self) -> torch.Tensor:
        """Return the master weight in float32: the live tensor, or a new one made of its low half."""
        return join(self.weight, self.master) if self.low_half else self.master

    def write_master(self, values: torch.Tensor) -> None:
        """Take over a master weight, float32 on any device; a low half brings its weight along."""
        if not self.low_half:
            self.master.copy_(values)
            return
        weight, low = split(values.to(self.weight.device))
        self.weight.copy_(weight)
        self.master.copy_(low)

    def release(self) -> None:
        """Let go of every tensor: gradient bucket, master weight, state. The part cannot be used again."""
        self.grad = self.master = self.weight = self.weight.new_empty(0)
        self.state.clear()


def tensor_parallel_dim(name: str, param: torch.nn.Parameter, topology: Topology) -> int | None:
    """Return the axis of a dense parameter that tensor-parallel ranks split, None if it is whole on each.

    Raises:
        OptimizerError: The parameter says it is split but not along which axis.
    """
    if topology.tensor.size == 1 or not getattr(param, "tensor_model_parallel", False):
        return None
    if not getattr(param, "allreduce", True):
        return None  # experts are spread over ranks whole
    dim = getattr(param, "partition_dim", -1)
    if not 0 <= dim < max(param.ndim, 1):
        raise OptimizerError(
            f"{name} {list(param.shape)}: tensor_model_parallel is set but partition_dim is {dim!r}; "
            f"set it to the axis that is split."
        )
    return int(dim)


class Ownership:
    """Who owns what: dense parameters over the data-parallel group, experts over their own."""

    def __init__(self, routed: Sequence[Routed], topology: Topology) -> None:
        """Plan the ownership; collective calls are not made.

        Args:
            routed: All parameters of the model.
            topology: Process groups.
        """
        self.units: list[Unit] = []
        for entry in routed:
            split = tensor_parallel_dim(entry.name, entry.param, topology) is not None
            if entry.route.algorithm == "normuon":
                unit = matrix_unit(entry.param.shape, topology.tensor.size if split else 1)
            else:
                unit = elementwise_unit(entry.param.shape)
            self.units.append(unit)
        self.shares: list[Share] = []
        for expert, group in ((False, topology.data), (True, topology.expert_data)):
            members = [index for index, entry in enumerate(routed) if entry.route.expert_parallel is expert]
            for share in plan([self.units[index] for index in members], group.size):
                self.shares.append(Share(members[share.unit], share.start, share.stop, share.owner))
        self.shares.sort(key=lambda share: (share.unit, share.owner))

    def rows(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return a parameter-shaped tensor as `[rows, row]`: the axis that may be split comes first."""
        return tensor.view(self.units[index].rows, -1)


def build_parts(
    routed: Sequence[Routed],
    ownership: Ownership,
    topology: Topology,
    *,
    shard: bool,
    momentum_dtype: torch.dtype,
    low_halves: bool = False,
) -> list[Part]:
    """Allocate this rank's parts with zero state.

    Args:
        routed: All parameters, with `main_grad` in place.
        ownership: The plan.
        topology: Process groups.
        shard: Update only what this rank owns; otherwise everything, on every rank.
        momentum_dtype: Storage type of NorMuon's momentum.
        low_halves: Keep of a bf16 parameter's master weight the low half alone.

    Returns:
        The parts in the model's parameter order.
    """
    parts = []
    shares = (
        ownership.shares if shard else [Share(i, 0, unit.rows, -1) for i, unit in enumerate(ownership.units)]
    )
    for share in shares:
        entry = routed[share.unit]
        group = topology.expert_data if entry.route.expert_parallel else topology.data
        if not shard or share.owner == group.rank:
            parts.append(_build_part(entry, share, ownership, topology, momentum_dtype, low_halves))
    return parts


def _build_part(
    entry: Routed,
    share: Share,
    ownership: Ownership,
    topology: Topology,
    momentum_dtype: torch.dtype,
    low_halves: bool,
) -> Part:
    param = entry.param
    whole = share.stop - share.start == ownership.units[share.unit].rows
    shape = param.shape if whole else torch.Size([share.stop - share.start, *param.shape[1:]])

    def view(tensor: torch.Tensor) -> torch.Tensor:
        return ownership.rows(share.unit, tensor)[share.start : share.stop].view(shape)

    weight = view(param.detach())
    master = weight
    if weight.dtype != torch.float32:
        master = torch.zeros_like(weight, dtype=torch.int16) if low_halves else weight.float()
    part = Part(
        index=share.unit,
        name=entry.name,
        route=entry.route,
        start=share.start,
        weight=weight,
        grad=view(param.main_grad),  # type: ignore[attr-defined]
        master=master,
    )
    if entry.route.algorithm == "normuon":
        part.matrix = (shape[-2], shape[-1])
        part.tensor_dim = tensor_parallel_dim(entry.name, param, topology)
        part.state["momentum_buffer"] = torch.zeros_like(weight, dtype=momentum_dtype)
        part.state["second_momentum_buffer"] = torch.zeros_like(weight[..., :1], dtype=torch.float32)
    elif entry.route.algorithm == "adamw":
        part.state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
        part.state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
    return part
