"""Are all ids of a build different? Found out from sorted 8-byte hashes, in little memory at any size."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.completion import shard_name
from vpmoe_assets.harmony.sources import Source

#: Hashes merged at once, so 16 MB of them.
_PER_RANGE = 1 << 20


def hash_file(state_dir: Path, shard: int) -> Path:
    """`.npy` of [2, n] uint64: the shard's 8-byte id hashes, sorted, and the rows they belong to."""
    return state_dir / f"{shard_name(shard)}.hashes.npy"


def require_unique_ids(sources: Sequence[Source], state_dir: Path, per_range: int = _PER_RANGE) -> None:
    """Compare the ids of all rows whose hashes are equal.

    Raises:
        DataError: Two rows have the same id; names both.
    """
    for (shard_a, row_a), (shard_b, row_b) in equal_hashes(
        [hash_file(state_dir, shard) for shard in range(len(sources))], per_range
    ):
        first, second = sources[shard_a].synth_id(row_a), sources[shard_b].synth_id(row_b)
        if first == second:
            raise DataError(
                f"duplicate synth_id {first!r}: shard {shard_a:02d}, {sources[shard_a].describe(row_a)}, and "
                f"shard {shard_b:02d}, {sources[shard_b].describe(row_b)}. "
                "Ids must be unique within a build; nothing was published"
            )


def equal_hashes(
    files: Sequence[Path], per_range: int = _PER_RANGE
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs `(shard, row), (shard, row)` of rows with the same hash, earlier row first.

    The hash range is cut into equal parts; of each shard only the slice that falls into the part is read.

    Args:
        files: Per shard, `.npy` of [2, n] uint64: sorted hashes, and their rows.
        per_range: Hashes per part, about.
    """
    mapped = [np.load(path, mmap_mode="r") for path in files]
    parts = max(1, -(-sum(both.shape[1] for both in mapped) // per_range))
    bounds = [part * 2**64 // parts for part in range(1, parts)]
    starts = [0] * len(mapped)
    for bound in (*bounds, None):
        hashes, shards, rows = [], [], []
        for shard, (sorted_hashes, its_rows) in enumerate(mapped):
            stop = (
                sorted_hashes.size
                if bound is None
                else int(np.searchsorted(sorted_hashes, np.uint64(bound), side="left"))
            )
            part = slice(starts[shard], stop)
            starts[shard] = stop
            hashes.append(sorted_hashes[part])
            rows.append(its_rows[part])
            shards.append(np.full(stop - part.start, shard, dtype=np.int64))
        values, shard_of, row_of = np.concatenate(hashes), np.concatenate(shards), np.concatenate(rows)
        order = np.lexsort((row_of, shard_of, values))
        values, shard_of, row_of = values[order], shard_of[order], row_of[order]
        first = 0
        for later in np.flatnonzero(values[1:] == values[:-1]) + 1:
            # Every member of a run of equal hashes against every earlier one: true collisions may mix with
            # duplicates.
            first = first if first < later and values[first] == values[later] else int(later) - 1
            for earlier in range(first, int(later)):
                yield (
                    (int(shard_of[earlier]), int(row_of[earlier])),
                    (int(shard_of[later]), int(row_of[later])),
                )
