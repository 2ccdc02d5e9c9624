"""Document-aligned packing: a sample holds only whole documents.

Cutting a concatenation into equal windows would begin samples in the middle of a message. Here the documents
of an epoch are permuted, cut into blocks, and each block is packed by best-fit decreasing into bins of
`seq_len` tokens; the bins of all blocks are then permuted with the same stream. Blocks keep the packing
local (a bin mixes documents that the permutation put near each other) and the cost linear in the corpus.

What keeps the documents of a bin apart in the model is `trainer.model.document_mask`.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.data.rng import permutation, stream
from trainer.errors import DataError

ALGORITHM = "document-best-fit-decreasing/1"
"""Goes into the key of every stored index: change it whenever the same arguments would give another order."""


def best_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack one block: longest document first, each into the fullest bin that still has room.

    Equal lengths are taken by position, equally full bins by age. Open bins are held in one sorted list of
    `room * n + bin`, so finding the fullest fitting bin and its oldest twin is a single bisection.

    Args:
        lengths: Tokens of each document [n], every one in `[1, capacity]`.
        capacity: Tokens per bin.

    Returns:
        `(order, sizes)`: positions in the block [n] int64, bin by bin in order of opening and within a bin
        In order of placement, and the documents of each bin [bins] int64.
    """
    n = len(lengths)
    placement = np.argsort(-lengths.astype(np.int64), kind="stable")
    descending = lengths[placement].tolist()
    smallest_useful = (
        int(descending[-1]) * n if n else 0
    )  # a bin with less room than this can never take another
    open_bins: list[int] = []
    bins: list[int] = []
    opened = 0
    for length in descending:
        needed = length * n
        at = bisect_left(open_bins, needed)
        if at == len(open_bins):
            key = (capacity - length) * n + opened
            bins.append(opened)
            opened += 1
        else:
            key = open_bins.pop(at) - needed
            bins.append(key % n)
        if key >= smallest_useful:
            insort(open_bins, key)
    assigned = np.array(bins, dtype=np.int64)
    return placement[np.argsort(assigned, kind="stable")], np.bincount(assigned, minlength=opened)


def pack(
    lengths: NDArray[np.integer],
    *,
    seq_len: int,
    block: int,
    seed: int,
    epoch: int,
    describe: Callable[[int], str] = "document {}".format,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack the documents of one epoch.

    Args:
        lengths: Tokens of each document [n].
        seq_len: Tokens per sample, `S`.
        block: Documents packed together.
        seed: Experiment seed.
        epoch: Epoch number from 0.
        describe: Names a document in an error message.

    Returns:
        `(documents, sizes)`: document numbers [n] int64, sample by sample in sample order, and how many of
        Them each sample holds [samples] int64.

    Raises:
        DataError: If there is no document, or one is empty or longer than `seq_len`.
        ValueError: If `seq_len` or `block` is not positive.
    """
    for name, value in (("seq_len", seq_len), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    n = len(lengths)
    if n == 0:
        raise DataError("nothing to pack: the split has no documents")
    outside = np.flatnonzero((lengths < 1) | (lengths > seq_len))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{describe(first)} has {int(lengths[first])} tokens; a packed sample takes documents of 1 to"
            f" {seq_len} ({len(outside)} of {n} documents are outside). Build the data set with seq_len <="
            f" {seq_len}, or train with a longer one"
        )
    bits = stream(seed, epoch)
    documents = permutation(bits, n)
    sizes_of_blocks = []
    for start in range(0, n, block):
        chosen = documents[start : start + block]
        order, sizes = best_fit_decreasing(lengths[chosen], seq_len)
        documents[start : start + block] = chosen[order]
        sizes_of_blocks.append(sizes)
    sizes = np.concatenate(sizes_of_blocks)
    del sizes_of_blocks
    starts = np.cumsum(sizes) - sizes
    shuffled = permutation(bits, len(sizes))
    sizes = sizes[shuffled]
    # Row j of the result comes from `starts` of its bin plus its place inside the bin.
    rows = np.repeat(starts[shuffled] - (np.cumsum(sizes) - sizes), sizes)
    rows += np.arange(n)
    return documents[rows], sizes
