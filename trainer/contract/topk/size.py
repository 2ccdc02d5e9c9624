"""What a store takes on disk, to plan with: `docs/topk_store.md` has what was measured, and on what."""

from dataclasses import dataclass

SOURCE = "measured with a vocabulary of 151,936 (benchmarks/topk_store.py)"
"""Where the figures below are from."""

_REST = 2.2
_BY_ID = 2.15
_BY_DRAW = 2.0
"""Bytes of a supervised token: label and tail; an id with its log-probability (off by 0.01); a draw."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of one supervised token.

    Attributes:
        stored: In a store of this format.
        plain: As int32 ids and fp16 log-probabilities, draws as int32 ids.
    """

    stored: float
    plain: int


def token_bytes(topk: int, tail_draws: int) -> TokenBytes:
    """Return what a supervised token takes, about.

    Args:
        topk: Ids that are kept of it.
        tail_draws: Draws from the rest.
    """
    stored = _REST + _BY_ID * topk + _BY_DRAW * tail_draws
    return TokenBytes(round(stored, 1), 6 * topk + 4 * tail_draws)
