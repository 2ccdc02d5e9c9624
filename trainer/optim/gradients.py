"""Main gradients: accumulated in float32 over micro-batches, summed over ranks in large buckets.

`loss.backward()` leaves a parameter's gradient in `param.main_grad`, a float32 view into a flat bucket,
and frees `param.grad` at once, so at most one gradient in the model's own type is alive at a time. What
writes into `main_grad` past autograd (a fused weight-gradient kernel, a replayed graph) says so with
`trainer.model.parameters.mark_written`. Gradients are summed, never averaged: the loss already divides by
counts of the whole global batch.

Every parameter that requires a gradient must get one in every step, if only zeros (as experts without tokens
do); a step that would pass over one in silence is refused.
"""

import weakref
from collections.abc import Callable, Sequence

import torch

from trainer.errors import MissingGradientError, OptimizerError
from trainer.model.parameters import is_written, mark_written, take_written
from trainer.optim.routing import Routed
from trainer.optim.topology import Group, Topology

#: Elements of one bucket (256 MiB): large enough for full bandwidth, small enough to be no burden.
BUCKET_ELEMENTS = 1 << 26
#: Every parameter starts on a 64-byte boundary.
ALIGN_ELEMENTS = 16


class Gradients:
    """The float32 gradients of a set of parameters.

    Over the expert-data-parallel group for expert-parallel parameters, over the data-parallel group for all
    others. Parameters with `tp_grad_sum` (or Megatron's `sequence_parallel`), which every tensor-parallel
    rank holds whole but for which it sees only its own heads' or tokens' part of the gradient, are summed
    over that group too.
    """

    def __init__(
        self, routed: Sequence[Routed], topology: Topology, *, bucket_elements: int = BUCKET_ELEMENTS
    ) -> None:
        """Allocate the buckets and hooks into autograd.

        Args:
            routed: The parameters, in the same order on every rank.
            topology: Process groups.
            bucket_elements: A bucket is closed before it would grow beyond this.

        Raises:
            OptimizerError: A parameter already feeds another optimizer.
        """
        self._routed = list(routed)
        self._topology = topology
        self._reduced = False
        self._buckets: list[tuple[torch.Tensor, list[Group]]] = []
        self._kinds = self._by_groups()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for entry in self._routed:
            if getattr(entry.param, "main_grad", None) is not None:
                raise OptimizerError(
                    f"{entry.name}: already belongs to another optimizer; close() that one first."
                )
            take_written(entry.param)
        for indices, groups in self._kinds:
            self._allocate(indices, groups, bucket_elements)
        for index, entry in enumerate(self._routed):
            self._handles.append(_hook(entry.param, _accumulate_into(weakref.ref(self), index)))

    def _by_groups(self) -> list[tuple[list[int], list[Group]]]:
        kinds: dict[tuple[bool, bool], list[int]] = {(False, False): [], (False, True): [], (True, False): []}
        for index, entry in enumerate(self._routed):
            partial = getattr(entry.param, "tp_grad_sum", False) or getattr(
                entry.param, "sequence_parallel", False
            )
            if partial and entry.route.expert_parallel:
                raise OptimizerError(
                    f"{entry.name}: an expert-parallel parameter cannot ask for a tensor-parallel gradient "
                    "sum; "
                    f"its data-parallel group holds those ranks already."
                )
            kinds[entry.route.expert_parallel, bool(partial)].append(index)
        data, expert, tensor = self._topology.data, self._topology.expert_data, self._topology.tensor
        groups = {(False, False): [data], (False, True): [data, tensor], (True, False): [expert]}
        return [(indices, groups[kind]) for kind, indices in kinds.items() if indices]

    def _allocate(self, indices: list[int], groups: list[Group], bucket_elements: int) -> None:
        filling: list[tuple[int, int]] = []
        size = 0
        for index in indices:
            padded = -(-self._routed[index].param.numel() // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
            if filling and size + padded > bucket_elements:
                self._close_bucket(filling, size, groups)
                filling, size = [], 0
            filling.append((index, size))
            size += padded
        self._close_bucket(filling, size, groups)

    def _close_bucket(self, members: list[tuple[int, int]], size: int, groups: list[Group]) -> None:
        device = self._routed[members[0][0]].param.device
        flat = torch.zeros(size, dtype=torch.float32, device=device)
        self._buckets.append((flat, groups))
        for index, offset in members:
            param = self._routed[index].param
            param.main_grad = flat[offset : offset + param.numel()].view(param.shape)  # type: ignore[attr-defined]

    def accumulate(self, index: int) -> None:
        """Move one parameter's fresh `grad` into its main gradient; called by autograd."""
        entry = self._routed[index]
        grad = entry.param.grad
        if grad is None:
            return
        entry.param.grad = None
        if grad.layout != torch.strided:
            raise OptimizerError(
                f"{entry.name}: sparse gradients are not supported; build the embedding dense."
            )
        if self._reduced:
            raise OptimizerError(
                f"{entry.name}: a backward pass ran after step() without zero_grad() before it."
            )
        # The first of a step replaces what the step before left, so that nobody has to clear it: of a large
        # model that would be a tenth of the step.
        if is_written(entry.param):
            entry.param.main_grad.add_(grad)  # type: ignore[attr-defined]
        else:
            entry.param.main_grad.copy_(grad)  # type: ignore[attr-defined]
        mark_written(entry.param)

    def zero(self) -> None:
        """Forget all gradients; the next backward pass starts afresh.

        Raises:
            OptimizerError: Gradients were written after `reduce()`, which would be lost.
        """
        late = [entry.name for entry in self._routed if take_written(entry.param)]
        if self._reduced and late:
            raise OptimizerError(
                f"{_named(late)}: gradients were written after step() without zero_grad() before them."
            )
        for entry in self._routed:
            entry.param.grad = None
        self._reduced = False

    def reduce(self) -> list[bool]:
        """Sum the gradients over their groups.

        Returns:
            For each parameter, whether it takes part in this step: whether it requires a gradient.

        Raises:
            MissingGradientError: A parameter that requires a gradient got none since `zero()` on any rank of
                its group; raised on every rank.
            OptimizerError: Called twice without `zero()` in between.
        """
        if self._reduced:
            raise OptimizerError(
                "gradients were already reduced: call zero_grad() before the next backward pass."
            )
        self._reduced = True
        expected = [entry.param.requires_grad for entry in self._routed]
        self._require_written(expected)
        for flat, groups in self._buckets:
            for group in groups:
                group.sum_(flat)
        return expected

    def _require_written(self, expected: list[bool]) -> None:
        """Refuse a step in which a gradient is missing: alike on every rank, before any weight changes."""
        written = [take_written(entry.param) for entry in self._routed]
        for entry, seen in zip(self._routed, written, strict=True):
            if not seen:  # on this rank: what stands there is of an earlier step
                entry.param.main_grad.zero_()  # type: ignore[attr-defined]
        missing = [wanted and not seen for wanted, seen in zip(expected, written, strict=True)]
        if self._topology.world.size > 1:
            device = self._buckets[0][0].device
            flags = torch.tensor(missing, dtype=torch.int32, device=device)
            for indices, groups in self._kinds:  # a gradient of one rank of the group is the group's
                own = flags[indices]
                for group in groups:
                    group.min_(own)
                flags[indices] = own
            self._topology.world.max_(flags)
            missing = [bool(flag) for flag in flags.tolist()]
        names = [entry.name for entry, lacks in zip(self._routed, missing, strict=True) if lacks]
        if names:
            raise MissingGradientError(
                f"{_named(names)}: {len(names)} of {sum(expected)} parameters that require a gradient got "
                "none in this step, and no weight has changed. Autograd must reach them in some micro-batch; "
                "code that writes param.main_grad itself must call "
                "trainer.model.parameters.mark_written(param) in each backward pass or replay; what is not "
                "to be trained needs requires_grad False."
            )

    def close(self) -> None:
        """Take the hooks and the buckets off the parameters, so that another optimizer may have them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buckets.clear()
        for entry in self._routed:
            entry.param.main_grad = None  # type: ignore[attr-defined]


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hook(
    param: torch.nn.Parameter, hook: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Register a hook that also works on a parameter that is frozen now and thawed later."""
    requires_grad = param.requires_grad
    param.requires_grad_(True)
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(requires_grad)
    return handle


def _accumulate_into(owner: "weakref.ref[Gradients]", index: int) -> Callable[[torch.Tensor], None]:
    """Return the autograd hook of one parameter; weak, so that a model keeps no dropped optimizer alive."""

    def hook(_: torch.Tensor) -> None:
        gradients = owner()
        if gradients is not None:
            gradients.accumulate(index)

    return hook
