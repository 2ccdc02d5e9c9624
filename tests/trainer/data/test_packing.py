"""Document-aligned packing, against a naive packer and its own contract."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import best_fit_decreasing, pack
from trainer.data.rng import permutation, stream
from trainer.errors import DataError


def naive_best_fit_decreasing(lengths, capacity):
    """The rule, word for word: longest first, fullest bin that fits, ties by position. Quadratic."""
    bins = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b in bins if sum(lengths[i] for i in b) + lengths[position] <= capacity]
        if fits:
            max(fits, key=lambda b: sum(lengths[i] for i in b)).append(
                position
            )  # max takes the first of equals
        else:
            bins.append([position])
    return bins


def naive_pack(lengths, seq_len, block, seed, epoch):
    """Whole algorithm in Python lists, with Philox words drawn one at a time."""
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    shuffle = lambda n: [i for _, i in sorted((int(bits.random_raw()), i) for i in range(n))]  # noqa: E731
    order = shuffle(len(lengths))
    bins = []
    for start in range(0, len(order), block):
        chosen = order[start : start + block]
        bins += [
            [chosen[i] for i in b] for b in naive_best_fit_decreasing([lengths[d] for d in chosen], seq_len)
        ]
    return [bins[b] for b in shuffle(len(bins))]


def as_lists(documents, sizes):
    return [part.tolist() for part in np.split(documents, np.cumsum(sizes)[:-1])]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_decreasing_equals_the_naive_packer(lengths):
    order, sizes = best_fit_decreasing(np.array(lengths), 30)
    assert as_lists(order, sizes) == naive_best_fit_decreasing(lengths, 30)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    block=st.integers(1, 100),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 5),
)
def test_pack_equals_the_naive_algorithm(lengths, block, seed, epoch):
    found = pack(np.array(lengths, dtype=np.int32), seq_len=40, block=block, seed=seed, epoch=epoch)
    assert as_lists(*found) == naive_pack(lengths, 40, block, seed, epoch)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seq_len=st.integers(1, 5000), block=st.integers(1, 300))
def test_every_document_once_and_no_bin_overfull(data, seq_len, block):
    lengths = np.array(data.draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=300)), dtype=np.int32)
    documents, sizes = pack(lengths, seq_len=seq_len, block=block, seed=7, epoch=1)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    assert sizes.min() >= 1
    totals = np.add.reduceat(lengths[documents], np.cumsum(sizes) - sizes)
    assert totals.max() <= seq_len


def test_epochs_and_seeds_differ_and_repeat():
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    runs = {
        (seed, epoch): pack(lengths, seq_len=100, block=64, seed=seed, epoch=epoch)[0].tobytes()
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(runs.values())) == 4
    assert pack(lengths, seq_len=100, block=64, seed=1, epoch=1)[0].tobytes() == runs[1, 1]


def test_order_is_the_one_of_earlier_releases():
    """A golden value of our own: if it moves, every resumed run reads other samples. Then bump ALGORITHM."""
    lengths = (np.arange(1000) * 37 % 211 + 1).astype(np.int32)
    documents, sizes = pack(lengths, seq_len=256, block=128, seed=1234, epoch=3)
    digest = hashlib.sha256(documents.astype("<i8").tobytes() + sizes.astype("<i8").tobytes()).hexdigest()
    assert digest == "548ba99965a0e68a8457de4dcd4c890ca7d866abe02daa076aa5f5dd50607c1f"


def test_permutation_is_uniform():
    """All 24 orders of 4 about equally often: chi-squared with 23 degrees of freedom, 99.99 % point 57."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(4800):
        order = tuple(permutation(stream(0, epoch), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 57


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1), (2**64, 0)])
def test_key_words_out_of_range_are_refused(seed, epoch):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*64\)"):
        stream(seed, epoch)


def test_fill_ratio_on_lengths_like_those_of_the_corpus():
    """Bulk around 850 tokens, a heavier upper tail (mean 856, 90 % below 1111), cut at 2048."""
    generator = np.random.default_rng(0)
    bulk = generator.normal(845, 190, size=19_600)
    tail = generator.uniform(1300, 2048, size=400)
    lengths = np.clip(np.concatenate([bulk, tail]), 150, 2048).astype(np.int32)
    assert 830 < lengths.mean() < 880
    _, sizes = pack(lengths, seq_len=2048, block=1024, seed=1234, epoch=0)
    assert lengths.sum() / (len(sizes) * 2048) == pytest.approx(0.96, abs=0.015)


@pytest.mark.shared
def test_fill_ratio_on_real_lengths(shared_dir):
    """Lengths of 250 real rows, drawn with replacement to corpus size, beat next-fit by far."""
    real = np.array(pq.read_table(shared_dir / "synth_rows_250.parquet")["n_tokens"].to_pylist())
    lengths = np.minimum(np.random.default_rng(0).choice(real, size=20_000), 2048).astype(np.int32)
    _, sizes = pack(lengths, seq_len=2048, block=1024, seed=1234, epoch=0)
    fill = lengths.sum() / (len(sizes) * 2048)
    next_fit, room = 1, 2048
    for length in lengths.tolist():
        if length > room:
            next_fit, room = next_fit + 1, 2048
        room -= length
    assert fill == pytest.approx(0.96, abs=0.015)
    assert lengths.sum() / (next_fit * 2048) < 0.85


def test_document_longer_than_a_sample_is_refused_by_name():
    with pytest.raises(DataError, match=r"document 1 of there has 11 tokens.*1 to 10 \(2 of 3"):
        pack(
            np.array([3, 11, 12]),
            seq_len=10,
            block=4,
            seed=0,
            epoch=0,
            describe="document {} of there".format,
        )


def test_nothing_to_pack_is_refused():
    with pytest.raises(DataError, match="no documents"):
        pack(np.array([], dtype=np.int32), seq_len=10, block=4, seed=0, epoch=0)


@pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"block": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        pack(np.array([1]), **({"seq_len": 10, "block": 4, "seed": 0, "epoch": 0} | wrong))
