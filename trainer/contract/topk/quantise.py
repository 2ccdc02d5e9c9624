"""Log-probs as whole steps, within a bound, their mass never above 1.

A position's log-probs, and that of its tail, are -(L + phase / 64) · step with one phase of the position.
The step is a little less than twice the bound, and numbers are rounded a little upwards (`_SLACK`),
probabilities that is downwards. One phase of the 64 brings the mass of what is decoded to at most 1:
averaged over the phases, a probability grows by at most step/128 (they are a grid), by step²/24 (exp is
convex) and by what the teacher's own mass exceeds 1, together less than the slack. The first phase that does
it is taken, in an order that spreads them, so that most positions have one of few.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError

PHASES = 64
_ORDER = tuple(int(f"{number:06b}"[::-1], 2) for number in range(PHASES))
_STEP, _SLACK = 1.94, 0.029
"""In units of the bound: half a step and the slack stay below it, with room for the rounding of float32."""


def step_of(error: float) -> float:
    """Return the step between neighbouring log-probs, from the bound of their error."""
    return _STEP * error


def to_logprobs(
    steps: NDArray[np.integer], phases: NDArray[np.integer] | int, error: float
) -> NDArray[np.float32]:
    """Return log-probs.

    Args:
        steps: L, any shape.
        phases: Of a shape that broadcasts.
        error: The bound.
    """
    result: NDArray[np.float32] = steps.astype(np.float32)
    result += np.asarray(phases, np.float32) / np.float32(PHASES)
    result *= np.float32(-step_of(error))
    return result


def to_steps(logprobs: NDArray[np.floating], error: float) -> NDArray[np.int64]:
    """Return the steps of log-probs by themselves, phase 0."""
    return np.rint(-logprobs.astype(np.float64) / step_of(error)).astype(np.int64)


def quantise(
    logprobs: NDArray[np.float32], tail_mass: NDArray[np.float32], error: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Quantise positions.

    Args:
        logprobs: Falling, -inf where there is none, [n, K].
        tail_mass: [n].
        error: The bound.

    Returns:
        Steps of the log-probs [n, K], steps of the tails [n], phases [n]; steps of what is absent are 0.

    Raises:
        StoreError: If no phase gives a mass of at most 1, so that the mass was above 1 before.
    """
    with np.errstate(divide="ignore"):
        exact = np.concatenate(
            [logprobs.astype(np.float64), np.log(tail_mass.astype(np.float64))[:, None]], 1
        )
    present = np.isfinite(exact)
    exact = np.where(present, -exact / step_of(error), 0.0) + _SLACK / _STEP + 0.5
    steps = np.zeros(exact.shape, np.int64)
    phases = np.zeros(len(exact), np.int64)
    rows = np.arange(len(exact))
    for phase in _ORDER:
        tried = np.floor(exact[rows] - phase / PHASES).astype(np.int64)
        decoded = to_logprobs(tried, phase, error).astype(np.float64)
        fits = (np.exp(decoded) * present[rows]).sum(axis=1) <= 1
        fits &= ((tried >= 0) | ~present[rows]).all(axis=1)
        steps[rows[fits]], phases[rows[fits]] = tried[fits], phase
        rows = rows[~fits]
        if not len(rows):
            steps[~present] = 0
            return steps[:, :-1], steps[:, -1], phases
    raise StoreError(f"position {rows[0]} has a mass above 1")
