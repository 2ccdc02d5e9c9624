"""The down projection of a narrowed FFN, refitted to the outputs of the FFN it replaces.

The narrowed FFN keeps some of the donor's up-projection rows and computes `W₂ relu(W₁ z + b₁)² + b₂` where
the donor computes `W_down (act(W_gate z) · W_up z)`. With W₁ and b₁ given, the best W₂ and b₂ on a
calibration set are a linear least-squares problem in the hidden activations. Its normal equations are summed
over chunks of tokens in float64, so memory does not grow with the calibration set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.model.config import squared_relu
from trainer.surgery.streams import DonorStream, FfnObserver


@dataclass(frozen=True)
class Refit:
    """A refitted down projection.

    Attributes:
        weight: `[H, F]` float64.
        bias: `[H]` float64.
        relative_mse_before: Mean square error of the weights that were there, over that of predicting zero.
        relative_mse_after: The same of the refitted ones.
        silent_neurons: Neurons that no calibration token activates; their columns are zero.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    relative_mse_before: float
    relative_mse_after: float
    silent_neurons: int


class NormalEquations:
    """Sums of a least-squares problem `outputs ≈ W features + b`, in float64."""

    def __init__(self, features: int, outputs: int, *, device: str | torch.device = "cpu") -> None:
        size = features + 1  # the last feature is 1
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross = torch.zeros(size, outputs, dtype=torch.float64, device=device)
        self._power = 0.0

    def add(self, features: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add a chunk.

        Args:
            features: `[tokens, F]`.
            outputs: `[tokens, O]`.
        """
        x = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
        y = outputs.double()
        self._gram.addmm_(x.t(), x)
        self._cross.addmm_(x.t(), y)
        self._power += float(y.square().sum())

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimise `Σ ‖W x + b − y‖² + ridge · Σ_i s_i ‖W_i‖²` s_i being Σ x_i².

        The penalty is relative to each feature's own scale (that of squared activations spans many orders of
        magnitude), and the bias is not penalised. Features that are zero throughout get zero weights.

        Args:
            ridge: Strength, 0 for plain least squares.

        Returns:
            W `[O, F]` and b `[O]`.

        Raises:
            ValueError: Nothing was added, or a sum is not finite.
        """
        scale = self._gram.diagonal().clone()
        tokens = float(scale[-1])
        if not tokens > 0 or not torch.isfinite(self._gram).all() or not torch.isfinite(self._cross).all():
            raise ValueError(
                f"the least-squares sums over {tokens:g} tokens cannot be solved: no calibration token was "
                "seen, or an activation is not finite; check the donor's weights and the calibration text"
            )
        alive = scale > 0
        root = scale[alive].sqrt()
        normal = self._gram[alive][:, alive] / root / root[:, None]
        normal.diagonal()[:-1] += ridge
        wanted = self._cross[alive] / root[:, None]
        # Symmetric, so a pseudo-inverse by eigenvalues: without a ridge, features may be collinear.
        values, vectors = torch.linalg.eigh(normal)
        floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
        inverse = torch.where(values > floor, 1.0 / values, 0.0)
        solution = torch.zeros_like(self._cross)
        solution[alive] = (vectors * inverse) @ (vectors.t() @ wanted) / root[:, None]
        return solution[:-1].t().contiguous(), solution[-1].clone()

    def relative_mse(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """`Σ ‖W x + b − y‖² / Σ ‖y‖²` over all that was added.

        Args:
            weight: `[O, F]`.
            bias: `[O]`.

        Raises:
            ValueError: The outputs are all zero.
        """
        if not self._power > 0:
            raise ValueError("the donor's outputs are zero (or not finite) on all calibration tokens")
        both = torch.cat((weight.t(), bias[None])).to(self._gram)
        excess = float((both * (self._gram @ both - 2.0 * self._cross)).sum())
        return max(0.0, 1.0 + excess / self._power)

    @property
    def silent(self) -> int:
        """Features that were zero throughout."""
        return int((self._gram.diagonal()[:-1] == 0).sum())


@dataclass(frozen=True)
class NarrowFfn:
    """The FFN to refit.

    Attributes:
        fc1_weight: `[F, H]`.
        fc1_bias: `[F]` or None.
        fc2_weight: `[H, F]`, as it is before.
        fc2_bias: `[H]` or None for zero.
    """

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None = None


def refit_layers(
    donor: DonorStream, narrow: Callable[[int], NarrowFfn], *, ridge: float
) -> Iterator[tuple[int, Refit]]:
    """Refit each layer's down projection while the donor runs once over the calibration slice.

    Inputs of every layer are the donor's own, so the layers' fits do not depend on each other.

    Args:
        donor: At its start.
        narrow: The FFN that takes the place of that of layer n (from 1).
        ridge: See `NormalEquations.solve`.

    Yields:
        The layer's number and its fit, first layer first.
    """
    for number in range(1, donor.layers + 1):
        ffn = narrow(number)
        hidden, width = ffn.fc2_weight.shape
        sums = NormalEquations(width, hidden, device=donor.device)
        donor.run(donor.load(number), observe_ffn=_adder(sums, ffn, donor.device))
        zero = torch.zeros(hidden) if ffn.fc2_bias is None else ffn.fc2_bias
        weight, offset = sums.solve(ridge)
        yield (
            number,
            Refit(
                weight.cpu(),
                offset.cpu(),
                sums.relative_mse(ffn.fc2_weight, zero),
                sums.relative_mse(weight, offset),
                sums.silent,
            ),
        )


def _adder(sums: NormalEquations, ffn: NarrowFfn, device: torch.device) -> FfnObserver:
    weight = ffn.fc1_weight.to(device, torch.float32)
    bias = None if ffn.fc1_bias is None else ffn.fc1_bias.to(device, torch.float32)

    def add(inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        sums.add(squared_relu(torch.nn.functional.linear(inputs, weight, bias)), outputs)

    return add
