"""NorMuon of matrices with a short side, by a kernel that updates one matrix a program.

The experts' matrices, 40 thousand of them, are nearly all there is to update. `trainer.optim.matrices` does
so in a dozen passes over batches of them; the kernel of `trainer.optim.normuon_kernel` in one. Both compute
the same update but for rounding. With the rounding of a GPU put in by hand, the kernel's orthogonal factors
of 128 × 1024 are off by 0.70 to 0.80 of what batched products in bf16 are (2.1e-2 and 3.0e-2 of random
matrices, 9.0e-2 and 11.6e-2 where singular values fall by three decades), and squared norms of wide rows by
1.5e-2 at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.contract.schema.training import OptimizerConfig
from trainer.optim.parts import Part
from trainer.optim.polar_express import NORM_EPSILON, Coefficients
from trainer.optim.routing import Route
from trainer.optim.tables import aligned, table

SHORT_SIDES = (16, 32, 64, 128)
SMALLEST_LONG = 64
"""The long side is a multiple of it."""


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut and spread; none of it changes more than rounding.

    Attributes:
        wide: Numbers of the long side that are worked off at a time, of a wide matrix.
        tall: The same of a tall one.
        restart: Iterations before the Gram matrix is taken anew. After 2, norms of wide rows are off by up to
            2e-1; after 4, small singular values have drowned.
        programs: Programs a multiprocessor.
        warps: Of a program.
        stages: Tiles that are under way at a time.
        ahead: The same in the pass that applies the update.
        registers: A thread may use; None leaves it to the compiler.
    """

    wide: int = 64
    tall: int = 64
    restart: int = 3
    programs: int = 1
    warps: int = 8
    stages: int = 3
    ahead: int = 4
    registers: int | None = None


TILING = Tiling()


def fits(part: Part) -> bool:
    """Whether the kernel can update a part: by its shape, and because it is not split over ranks."""
    short, long = sorted(part.matrix)
    return (
        part.route.algorithm == "normuon"
        and part.tensor_dim is None
        and short in SHORT_SIDES
        and long % SMALLEST_LONG == 0
        and long > short
        and aligned(part.grad, part.master, part.weight, part.state["momentum_buffer"])
    )


@dataclass(frozen=True)
class _Group:
    """Matrices of one launch."""

    m: int
    n: int
    addresses: Tensor
    momentum: torch.dtype
    low_half: bool


class SmallMatrices:
    """The matrices that the kernel updates, with its work space.

    Args:
        parts: For each of which `fits` holds.
        rows: A route's row in the table of rates.
        settings: Of the optimizer.
        coefficients: Of Polar Express.
        tiling: How the kernel is cut.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rows: Mapping[Route, int],
        settings: OptimizerConfig,
        coefficients: Coefficients,
        *,
        tiling: Tiling = TILING,
    ) -> None:
        self._settings, self._tiling, self._iterations = settings, tiling, len(coefficients)
        self._groups = _groups(parts, rows)
        if not parts:
            return
        device = parts[0].weight.device
        self._table = torch.tensor(coefficients, dtype=torch.float32, device=device)
        # Triton's interpreter has no products in bf16, and rounds none of the others.
        processors, types = 2, (torch.float32, torch.float32)
        if device.type == "cuda":
            types = (torch.bfloat16, torch.float16)
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = processors * tiling.programs
        largest = max(group.m * group.n for group in self._groups)
        self._scratch = torch.empty(self._programs * largest, dtype=types[0], device=device)
        self._lifted = self._scratch.view(types[1])

    def step(self, rates: Tensor, gate: Tensor) -> None:
        """One step of all of them: momentum, row statistic, master weight and weight, in place.

        Args:
            rates: fp32 `[routes, 4]`, see `trainer.optim.device_step`.
            gate: fp32 `[2]`, see `trainer.optim.device_step`.
        """
        for group in self._groups:
            self._launch(group, rates, gate)

    def _launch(self, group: _Group, rates: Tensor, gate: Tensor) -> None:
        import triton.language as tl

        from trainer.optim.normuon_kernel import normuon_step

        settings, tiling = self._settings, self._tiling
        matrices, tall = group.addresses.size(0), group.m > group.n
        programs = min(self._programs, matrices)
        normuon_step[(programs,)](
            group.addresses,
            self._scratch,
            self._lifted,
            self._table,
            rates,
            gate,
            settings.normuon_momentum,
            settings.normuon_beta2,
            settings.normuon_eps,
            1 + settings.polar_express_safety_factor,
            NORM_EPSILON,
            matrices,
            LONG=max(group.m, group.n),
            SHORT=min(group.m, group.n),
            TILE=tiling.tall if tall else tiling.wide,
            TALL=tall,
            ITERATIONS=self._iterations,
            RESTART=max(1, min(tiling.restart, self._iterations - 1)),
            AHEAD=tiling.ahead,
            MOMENTUM=tl.bfloat16 if group.momentum == torch.bfloat16 else tl.float32,
            LOW_HALF=group.low_half,
            PER_PROGRAM=-(-matrices // programs),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            maxnreg=tiling.registers,
        )


def _groups(parts: Sequence[Part], rows: Mapping[Route, int]) -> list[_Group]:
    """Put the matrices of one shape together, whichever layers they are of."""
    members: dict[tuple[int, int, torch.dtype, bool], list[Part]] = {}
    for part in parts:
        kind = (*part.matrix, part.state["momentum_buffer"].dtype, part.low_half)
        members.setdefault(kind, []).append(part)
    groups = []
    for (m, n, momentum, low_half), found in members.items():
        addresses = table([row for part in found for row in _addresses(part, rows)], found[0].weight.device)
        groups.append(_Group(m, n, addresses, momentum, low_half))
    return groups


def _addresses(part: Part, rows: Mapping[Route, int]) -> list[list[int]]:
    """Return the rows of the kernel's table for the matrices of a part."""
    tensors = (
        part.grad,
        part.state["momentum_buffer"],
        part.state["second_momentum_buffer"],
        part.master,
        part.weight,
    )
    batches = [part.batched(tensor) for tensor in tensors]
    steps = [batch.stride(0) * batch.itemsize for batch in batches]
    return [
        [
            *(batch.data_ptr() + index * step for batch, step in zip(batches, steps, strict=True)),
            rows[part.route],
        ]
        for index in range(batches[0].size(0))
    ]
