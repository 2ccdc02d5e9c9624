"""What training takes from each device: weights, gradients, optimizer state, activations, work space."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

from trainer.contract.activations import Device, Pass
from trainer.contract.keeping import keeps
from trainer.contract.parameters import Parameter, parameters
from trainer.contract.partition import Share, elementwise_unit, matrix_unit, plan
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.training import OptimizerConfig, TrainingConfig

WIDTHS = {"fp32": 4, "bf16": 2}
"""Bytes of a number."""
OPTIMIZER_CHUNK = 1 << 26
"""Elements that the optimizer updates at a time."""
_NORMUON_TEMPORARIES = 5
"""Tensors of that size, in fp32, that live at once in one NorMuon update."""


@dataclass(frozen=True)
class Layout:
    """Ranks of a run: `dp · tp` of them, experts spread over `ep` of the data-parallel ones."""

    dp: int = 1
    tp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        return f"dp {self.dp}, tp {self.tp}, ep {self.ep}"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest device. What the allocator rounds up and leaves unused comes on top.

    Attributes:
        layout: Ranks.
        sharded: Whether optimizer state is spread over data-parallel ranks by whole matrices.
        weights: In the model's dtype.
        gradients: fp32, accumulated over micro-batches.
        master: fp32 copies of weights that are not fp32 themselves, or the low halves of them.
        momentum: NorMuon's first moment.
        row_second_moments: NorMuon's second moment, one fp32 per row.
        adam: AdamW's two fp32 moments.
        activations: What the forward pass of one micro-batch keeps for the backward pass.
        work: What the loss, or the optimizer where that is more, takes for a moment.
    """

    layout: Layout
    sharded: bool
    weights: int
    gradients: int
    master: int
    momentum: int
    row_second_moments: int
    adam: int
    activations: int
    work: int

    @property
    def state(self) -> int:
        """What lies there from the first step to the last: all but activations and work space."""
        return (
            self.weights + self.gradients + self.master + self.momentum + self.row_second_moments + self.adam
        )

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.state + self.activations + self.work

    def as_dict(self) -> dict[str, int | bool]:
        """Return the plan with its sums, for JSON."""
        entries = asdict(self)
        return entries.pop("layout") | entries | {"state": self.state, "total": self.total}


def memory_plan(
    arch: Architecture,
    training: TrainingConfig,
    layout: Layout,
    *,
    seq_len: int,
    device: Device = "cuda",
    shard: bool = True,
) -> MemoryPlan:
    """Plan the training of an architecture.

    Ownership is planned by the optimizer's own function, so the figures are those of a real run's fullest
    rank.

    Args:
        arch: What is trained.
        training: Its dtype, micro-batch size and optimizer.
        layout: Ranks.
        seq_len: Tokens of a packed sample.
        device: Where it runs.
        shard: Spread the optimizer's state.
    """
    width, settings = WIDTHS[training.dtype], training.optimizer
    kept = keeps(training.backend)
    master = 2 if "low_halves" in kept else 4
    local = [_Local(entry, layout, width, settings, master) for entry in parameters(arch)]
    state = max(_rank_states(local, settings, layout, shard=shard), key=lambda rank: sum(rank.values()))
    rows = training.micro_batch_size
    forward = Pass(arch, seq_len, rows, width, device, layout.tp, layout.ep, training.backend)
    activations = forward.saved()
    if "captured_pass" in kept:  # and the kernels' own work space is small
        work = forward.loss_work()
    else:  # the optimizer works when the activations are gone: its work space counts where it exceeds them
        work = max(forward.loss_work(), _optimizer_work(local, layout, shard=shard) - activations)
    return MemoryPlan(
        layout=layout,
        sharded=shard,
        weights=sum(entry.elements * entry.width for entry in local),
        gradients=sum(entry.elements * 4 for entry in local),
        master=state["master"],
        momentum=state["momentum"],
        row_second_moments=state["row_second_moments"],
        adam=state["adam"],
        activations=activations,
        work=work,
    )


class _Local:
    """One parameter as a rank holds it, with the optimizer's algorithm for it."""

    def __init__(
        self, entry: Parameter, layout: Layout, width: int, settings: OptimizerConfig, master: int
    ) -> None:
        self.shape = entry.local_shape(layout.tp, layout.ep)
        self.elements = prod(self.shape)
        self.width = 4 if entry.float32 else width
        self.master = 0 if self.width == 4 else master
        self.matrices = settings.name == "normuon" and entry.kind == "matrices"
        self.separate = entry.expert and (layout.ep > 1 or layout.tp > 1)
        split = layout.tp if entry.split is not None and not entry.expert else 1
        self.unit = matrix_unit(self.shape, split) if self.matrices else elementwise_unit(self.shape)

    def state_bytes(self, settings: OptimizerConfig) -> dict[str, int]:
        state = {"master": self.master * self.elements}
        if self.matrices:
            state["momentum"] = WIDTHS[settings.momentum_dtype] * self.elements
            state["row_second_moments"] = 4 * self.elements // self.shape[-1]
        elif settings.name != "sgd":
            state["adam"] = 8 * self.elements
        return state


def _rank_states(
    local: Sequence[_Local], settings: OptimizerConfig, layout: Layout, *, shard: bool
) -> list[dict[str, int]]:
    """Return optimizer state by kind of each rank of the data-parallel group of tensor-parallel rank 0.

    Experts are owned over their own group, which spans the tensor-parallel ranks: rank r of it owns on data-
    parallel rank r // tp, whose first tensor-parallel rank stands for all.
    """
    ranks = [dict.fromkeys(("master", "momentum", "row_second_moments", "adam"), 0) for _ in range(layout.dp)]
    for separate, size in ((False, layout.dp), (True, layout.dp * layout.tp // layout.ep)):
        members = [entry for entry in local if entry.separate is separate]
        if not members:
            continue
        units = [entry.unit for entry in members]
        shares = plan(units, size) if shard else [Share(i, 0, unit.rows, 0) for i, unit in enumerate(units)]
        owned = [dict.fromkeys(ranks[0], 0) for _ in range(size)]
        for share in shares:
            part = (share.stop - share.start) / units[share.unit].rows
            for name, amount in members[share.unit].state_bytes(settings).items():
                owned[share.owner][name] += round(amount * part)
        fullest = max(owned, key=lambda state: sum(state.values()))
        for rank, state in enumerate(ranks):
            # One owner of experts may sit with any owner of the rest; the fullest of both is an upper bound.
            mine = fullest if separate or not shard else owned[rank]
            for name, amount in mine.items():
                state[name] += amount
    return ranks


def _optimizer_work(local: Sequence[_Local], layout: Layout, *, shard: bool) -> int:
    """Bytes that one update takes: a chunk of matrices several times over, or one list of other tensors."""
    ranks = layout.dp if shard else 1
    matrices = sum(entry.elements for entry in local if entry.matrices) // ranks
    largest = max((-(-entry.elements // ranks) for entry in local if not entry.matrices), default=0)
    others = min(sum(entry.elements for entry in local if not entry.matrices), max(OPTIMIZER_CHUNK, largest))
    return max(_NORMUON_TEMPORARIES * 4 * min(OPTIMIZER_CHUNK, matrices), 4 * others)
