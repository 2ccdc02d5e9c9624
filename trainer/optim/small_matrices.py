"""NorMuon of matrices with a short side, by a kernel that updates one matrix a program.

The experts' matrices, 40 thousand of them, are nearly all there is to update. `trainer.optim.matrices` does
so in a dozen passes over batches of them; the kernel of `trainer.optim.normuon_kernel` in one. Both compute
the same update but for rounding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.optim.parts import Part
from trainer.optim.polar_express import NORM_EPSILON, Coefficients
from trainer.optim.routing import Route

SHORT_SIDES = (16, 32, 64, 128)
TILE = 64
"""Numbers of the long side that are worked off at a time; half as many of a tall matrix."""
RESTART = 2
"""Iterations before the Gram matrix is taken anew."""
_PROGRAMS_PER_SM = 1
_WARPS = 8
_STAGES = 3


def fits(part: Part) -> bool:
    """Whether the kernel can update a part: by its shape, and because it is not split over ranks."""
    short, long = sorted(part.matrix)
    return (
        part.route.algorithm == "normuon"
        and part.tensor_dim is None
        and short in SHORT_SIDES
        and long % TILE == 0
        and long > short
    )


class SmallMatrices:
    """The parts that the kernel updates, with its work space.

    Args:
        parts: For each of which `fits` holds.
        coefficients: Of Polar Express.
        safety_factor: The margin that they were computed for.
    """

    def __init__(self, parts: Sequence[Part], coefficients: Coefficients, safety_factor: float) -> None:
        self.parts = list(parts)
        self._members = {id(part) for part in parts}
        self._safety = safety_factor
        self._restart = min(RESTART, len(coefficients) - 1)
        self._iterations = len(coefficients)
        if not parts:
            return
        device = parts[0].master.device
        self._table = torch.tensor(coefficients, dtype=torch.float32, device=device)
        processors, narrow = 2, torch.float32  # for Triton's interpreter, which has no bf16 products
        if device.type == "cuda":
            narrow = torch.bfloat16
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = processors * _PROGRAMS_PER_SM
        largest = max(part.matrix[0] * part.matrix[1] for part in parts)
        self._scratch = torch.empty(self._programs * largest, dtype=narrow, device=device)

    def __contains__(self, part: Part) -> bool:
        """Whether it updates a part."""
        return id(part) in self._members

    def step(
        self, *, rate: Callable[[Route], float], clip_scale: float, mu: float, beta2: float, eps: float
    ) -> None:
        """One step of all of them: momentum, row statistic, master weight and weight, in place.

        Args:
            rate: Learning rate of a route in this step.
            clip_scale: Factor on the gradients, which are left as they are.
            mu: Decay of the momentum.
            beta2: Decay of the row statistic.
            eps: See `trainer.optim.normuon.normuon_update`.
        """
        scalars: dict[Route, Tensor] = {}
        for part in self.parts:
            if part.route not in scalars:
                lr = rate(part.route)
                values = (
                    lr,
                    1 - lr * part.route.weight_decay,
                    mu,
                    beta2,
                    eps,
                    clip_scale,
                    1 + self._safety,
                    NORM_EPSILON,
                )
                scalars[part.route] = torch.tensor(values, dtype=torch.float32, device=part.master.device)
            self._launch(part, scalars[part.route])

    def _launch(self, part: Part, scalars: Tensor) -> None:
        from trainer.optim.normuon_kernel import normuon_step

        m, n = part.matrix
        matrices = part.master.numel() // (m * n)
        programs = min(self._programs, matrices)
        normuon_step[(programs,)](
            part.grad,
            part.state["momentum_buffer"],
            part.state["second_momentum_buffer"],
            part.master,
            part.weight,
            self._scratch,
            self._table,
            scalars,
            matrices,
            LONG=max(m, n),
            SHORT=min(m, n),
            TILE=TILE // 2 if m > n else TILE,
            TALL=m > n,
            ITERATIONS=self._iterations,
            RESTART=self._restart,
            KEEPS_MASTER=part.keeps_master,
            PER_PROGRAM=-(-matrices // programs),
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
