"""What training a model takes from each GPU before the first activation."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from trainer.contract.schema.training import OptimizerConfig
from trainer.optim.partition import Share, elementwise_unit, matrix_unit, plan
from trainer.optim.routing import Routed, route_model


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest GPU.

    Activations, the loss chunk, the exchange buffers of the optimizer and the allocator's slack come on top;
    they depend on the batch and the backend.

    Attributes:
        dp: Data-parallel GPUs.
        sharded: Whether optimizer state is spread over them by whole matrices.
        weights: In the model's dtype.
        gradients: fp32, accumulated over micro-batches.
        master: fp32 copies of weights that are not fp32 themselves.
        momentum: NorMuon's first moment.
        row_second_moments: NorMuon's second moment, one fp32 per row.
        adam: AdamW's two fp32 moments.
    """

    dp: int
    sharded: bool
    weights: int
    gradients: int
    master: int
    momentum: int
    row_second_moments: int
    adam: int

    @property
    def total(self) -> int:
        """Sum of all entries."""
        return (
            self.weights + self.gradients + self.master + self.momentum + self.row_second_moments + self.adam
        )

    def as_dict(self) -> dict[str, int | bool]:
        """Return the plan with its total, for JSON."""
        return asdict(self) | {"total": self.total}


def memory_plan(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerConfig, *, dp: int, shard: bool
) -> MemoryPlan:
    """Plan for a model whose tensors may be on the meta device.

    Ownership is planned by the optimizer's own function, so the figures are those of a real run's fullest
    rank.

    Args:
        named_parameters: Of the model, without tensor or expert parallelism.
        settings: Of the optimizer.
        dp: Data-parallel size.
        shard: Spread the optimizer's state.
    """
    routed = route_model(named_parameters, settings)
    units = [
        matrix_unit(entry.param.shape)
        if entry.route.algorithm == "normuon"
        else elementwise_unit(entry.param.shape)
        for entry in routed
    ]
    if shard:
        shares = plan(units, dp)
    else:
        shares = [Share(index, 0, unit.rows, rank) for index, unit in enumerate(units) for rank in range(dp)]
    ranks = [dict.fromkeys(("master", "momentum", "row_second_moments", "adam"), 0) for _ in range(dp)]
    momentum_bytes = {"fp32": 4, "bf16": 2}[settings.momentum_dtype]
    for share in shares:
        entry, state = routed[share.unit], ranks[share.owner]
        part = (share.stop - share.start) / units[share.unit].rows
        for name, amount in _state_bytes(entry, momentum_bytes).items():
            state[name] += round(amount * part)
    fullest = max(ranks, key=lambda state: sum(state.values()))
    return MemoryPlan(
        dp=dp,
        sharded=shard,
        weights=sum(entry.param.numel() * entry.param.element_size() for entry in routed),
        gradients=sum(entry.param.numel() * 4 for entry in routed),
        **fullest,
    )


def _state_bytes(entry: Routed, momentum_bytes: int) -> dict[str, int]:
    elements = entry.param.numel()
    state = {"master": 0 if entry.param.dtype == torch.float32 else 4 * elements}
    if entry.route.algorithm == "normuon":
        state["momentum"] = momentum_bytes * elements
        state["row_second_moments"] = 4 * elements // entry.param.shape[-1]
    elif entry.route.algorithm == "adamw":
        state["adam"] = 8 * elements
    return state
