import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.unique import equal_hashes, hash_file, require_unique_ids

HASHES = [0, 1, 2**63, 2**63 + 1, 2**64 - 1, 77, 2**40]


def save(directory, shards):
    paths = []
    for shard, hashes in enumerate(shards):
        values = np.array(hashes, dtype=np.uint64)
        order = np.argsort(values, kind="stable")
        paths.append(hash_file(directory, shard))
        np.save(
            paths[-1],
            np.stack([values[order], order.astype(np.uint64)]) if len(hashes) else np.zeros((2, 0), "<u8"),
        )
    return paths


@given(
    shards=st.lists(st.lists(st.sampled_from(HASHES), max_size=8), min_size=1, max_size=4),
    per_range=st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_every_pair_of_equal_hashes_is_found_once(tmp_path_factory, shards, per_range):
    paths = save(tmp_path_factory.mktemp("hashes"), shards)
    everything = [
        (hash_, (shard, row)) for shard, hashes in enumerate(shards) for row, hash_ in enumerate(hashes)
    ]
    expected = sorted(
        (a, b) for hash_a, a in everything for hash_b, b in everything if hash_a == hash_b and a < b
    )
    assert sorted(equal_hashes(paths, per_range)) == expected


class Ids:
    def __init__(self, ids):
        self._ids = ids

    def synth_id(self, row):
        return self._ids[row]

    def describe(self, row):
        return f"row {row}"


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path):
    save(tmp_path, [[5, 9], [9, 5]])
    require_unique_ids([Ids(["a", "b"]), Ids(["c", "d"])], tmp_path)
    with pytest.raises(DataError, match="duplicate synth_id 'b': shard 00, row 1, and shard 01, row 0"):
        require_unique_ids([Ids(["a", "b"]), Ids(["b", "d"])], tmp_path)


def test_a_duplicate_hidden_behind_a_collision_is_found(tmp_path):
    save(tmp_path, [[5, 5, 5]])
    with pytest.raises(DataError, match="duplicate synth_id 'a': shard 00, row 0, and shard 00, row 2"):
        require_unique_ids([Ids(["a", "b", "a"])], tmp_path)
