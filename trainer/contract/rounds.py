"""The arithmetic of rounds of rollouts."""

from fractions import Fraction


def round_size(buffer_size: int, delay: int) -> int:
    """Return how many rollouts are written before a step: the buffer, shared by the rounds on their way."""
    return buffer_size // (delay + 1)


def rollout_rows(global_batch_size: int, anchor_fraction: float) -> int:
    """Return how many samples of a step are rollouts, at most."""
    return global_batch_size - int(global_batch_size * Fraction(repr(anchor_fraction)))
