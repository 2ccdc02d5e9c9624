import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.indexed import IndexedWriter, map_elements, read_index


def write(prefix, sequences, dtype, at_once=3):
    with IndexedWriter(prefix, dtype) as writer:
        for start in range(0, len(sequences), at_once):
            part = sequences[start : start + at_once]
            writer.append(
                np.concatenate([np.asarray(item, dtype) for item in part]), [len(item) for item in part]
            )
        return writer.finish()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_files_equal_those_of_megatrons_builder_and_its_reader_reads_them(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 200, size).astype(dtype) for size in rng.integers(1, 60, 219)]
    write(tmp_path / "ours", sequences, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for sequence in sequences:
        builder.add_document(torch.from_numpy(sequence), [len(sequence)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "ours.idx").stat().st_size == 4422
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == 219
    for number, sequence in enumerate(sequences):
        assert np.array_equal(dataset[number], sequence)
        assert dataset[number].dtype == dtype
    assert dataset.document_indices.tolist() == list(range(220))


@given(sizes=st.lists(st.integers(1, 9), max_size=30), at_once=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_what_was_written_is_read_back_however_it_was_batched(tmp_path_factory, sizes, at_once):
    prefix = tmp_path_factory.mktemp("indexed") / "shard"
    sequences = [np.arange(size, dtype=np.int32) * 3 for size in sizes]
    files = write(prefix, sequences, np.int32, at_once)
    index = read_index(prefix.with_suffix(".idx"))
    assert index.lengths.tolist() == sizes
    assert (
        files[1].bytes
        == prefix.with_suffix(".idx").stat().st_size
        == 34 + 12 * len(sizes) + 8 * (len(sizes) + 1)
    )
    assert map_elements(prefix, index).tolist() == [value for sequence in sequences for value in sequence]


def test_recorded_digests_are_those_of_the_files(tmp_path):
    import hashlib

    files = write(tmp_path / "shard", [[1, 2], [3]], np.int32)
    for file, suffix in zip(files, (".bin", ".idx"), strict=True):
        content = (tmp_path / f"shard{suffix}").read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_lengths_that_do_not_fit_the_data_are_refused_and_nothing_is_left(tmp_path):
    with (
        pytest.raises(ValueError, match="12 bytes for 2 elements"),
        IndexedWriter(tmp_path / "s", np.int32) as writer,
    ):
        writer.append(np.arange(3, dtype=np.int32), [2])
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8 or int32"):
        IndexedWriter(tmp_path / "s", np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content[:20], "only 20 bytes"),
        (lambda content: b"X" + content[1:], "not an IndexedDataset index"),
        (lambda content: content[:34] + b"\xff" + content[35:], "byte offsets"),
        (lambda content: content[:-8] + b"\xff" * 8, "exactly one sequence"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage, message):
    write(tmp_path / "s", [[1, 2], [3]], np.int32)
    path = tmp_path / "s.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        read_index(path)


def test_a_short_bin_is_refused(tmp_path):
    write(tmp_path / "s", [[1, 2], [3]], np.int32)
    (tmp_path / "s.bin").write_bytes(b"\0" * 8)
    with pytest.raises(DataError, match="8 bytes, its index says 12"):
        map_elements(tmp_path / "s", read_index(tmp_path / "s.idx"))
