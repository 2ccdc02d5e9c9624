"""Counter-based randomness of the data order.

Every order is a pure function of `(seed, epoch)`: nothing has to be saved to make it again, and two epochs
are independent streams. Only the raw words of Philox are used. NumPy promises that those stay the same for
ever, and promises no such thing for `Generator.permutation`, whose change would silently reorder every
resumed run.
"""

import numpy as np
from numpy.typing import NDArray

_WORD = 2**64


def stream(seed: int, epoch: int) -> np.random.Philox:
    """Open the random stream of one epoch, at its beginning.

    Args:
        seed: Experiment seed, `0 <= seed < 2**64`.
        epoch: Epoch number from 0.

    Returns:
        A Philox-4x64 bit generator keyed by `(seed, epoch)`.

    Raises:
        ValueError: If a value does not fit the 64-bit key word.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < _WORD:
            raise ValueError(f"{name} = {value}: must be in [0, 2**64)")
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))


def permutation(bits: np.random.Philox, size: int) -> NDArray[np.int64]:
    """Draw a uniform permutation of `range(size)`, advancing the stream by `size` words.

    Sorting independent 64-bit keys is uniform but for equal keys (chance below `size**2 / 2**65`: 1.5e-4 at
    75 million documents), which a stable sort resolves the same way everywhere.
    """
    keys = np.asarray(bits.random_raw(size), dtype=np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
