"""Which training conversations a teacher scores: a hash of the tokens decides."""

import hashlib
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def scored_sequence(tokens: Sequence[int] | NDArray[np.integer], fraction: float) -> bool:
    """Decide whether a conversation of the training split is scored; all of the validation split are.

    The rule of the data set's own split (blake2b of 8 bytes, big-endian, against a threshold of 64 bits),
    over the token ids as little-endian int32, because the shards hold no `synth_id`. It depends on nothing
    but the conversation: neither order nor sharding moves it, and a larger fraction adds to a smaller one.

    Args:
        tokens: Token ids of the whole sequence, EOD included, [n].
        fraction: Share of the training split, 0 to 1.

    Raises:
        ValueError: If the fraction is not between 0 and 1.
    """
    content = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < _threshold(fraction)


@lru_cache(maxsize=16)
def _threshold(fraction: float) -> int:
    if not 0 <= fraction <= 1:
        raise ValueError(f"subset_fraction = {fraction}: expected a share between 0 and 1")
    return int(Decimal(str(fraction)) * 2**64)
