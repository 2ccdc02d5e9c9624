"""The sampler: one order for every layout, two integers of state."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.indexed import SpanDocuments
from trainer.data.kd import PackedDataset
from trainer.data.sampler import FILLERS, Sampler, collate, held_out
from trainer.errors import DataError


class Numbers:
    """A source whose sample says where it came from; epoch e has ``base + e`` samples."""

    def __init__(self, base=7, name="a"):
        self.base, self.name = base, name

    def num_samples(self, epoch):
        return self.base + epoch

    def pack_index_sha256(self, epoch):
        return f"{self.name}-{epoch}"

    def sample(self, epoch, index):
        return {"tokens": torch.tensor([epoch, index]), "loss_mask": torch.ones(2)}


def micro_batches(sampler, dataset, size):
    """This rank's part of the next global batch, read as the engine reads it."""
    return [
        collate([dataset.sample(*address) for address in addresses])
        for addresses in sampler.share(sampler.take(size))
    ]


def global_order(count, base):
    """The definition: epochs one after the other."""
    order, epoch = [], 0
    while len(order) < count:
        order += [(epoch, index) for index in range(base + epoch)]
        epoch += 1
    return order[:count]


@settings(deadline=None)
@given(
    base=st.integers(1, 9),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    dp=st.integers(1, 4),
    steps=st.integers(1, 6),
)
def test_all_ranks_together_read_the_global_order(base, micro, accumulation, dp, steps):
    size = micro * accumulation * dp
    ranks = [
        Sampler(Numbers(base), global_batch_size=size, micro_batch_size=micro, dp_rank=rank, dp_size=dp)
        for rank in range(dp)
    ]
    order = global_order(steps * size, base)
    for step in range(steps):
        expected = order[step * size : (step + 1) * size]
        batches = [sampler.take(size) for sampler in ranks]
        assert all(batch == expected for batch in batches)
        shares = [sampler.share(expected) for sampler in ranks]
        assert all(len(share) == accumulation for share in shares)
        assert all(len(part) == micro for share in shares for part in share)
        # Micro-batch by micro-batch, ranks side by side, is the batch in order.
        assert [
            address for part in zip(*shares, strict=True) for each in part for address in each
        ] == expected


@settings(deadline=None)
@given(
    base=st.integers(1, 9),
    size=st.sampled_from([4, 8]),
    before=st.integers(0, 8),
    dp=st.sampled_from([1, 2, 4]),
)
def test_resumed_sampler_goes_on_where_it_stood_on_any_layout(base, size, before, dp):
    straight = Sampler(Numbers(base), global_batch_size=size, micro_batch_size=1)
    for _ in range(before):
        straight.take(size)
    state = json.loads(json.dumps(straight.state_dict()))
    assert set(state) == {"epoch", "index", "pack_index_sha256"}

    resumed = Sampler(Numbers(base), global_batch_size=size, micro_batch_size=1, dp_rank=dp - 1, dp_size=dp)
    resumed.load_state_dict(state)
    assert [resumed.take(size) for _ in range(4)] == [straight.take(size) for _ in range(4)]
    assert (resumed.epoch, resumed.index) == (straight.epoch, straight.index)


def test_global_batch_size_may_change_and_the_order_stays():
    sampler = Sampler(Numbers(5), global_batch_size=4, micro_batch_size=1)
    read = sampler.take(4) + sampler.take(4)
    other = Sampler(Numbers(5), global_batch_size=2, micro_batch_size=2)
    other.load_state_dict(sampler.state_dict())
    assert read + other.take(2) == global_order(10, 5)


def test_order_of_other_data_is_refused_naming_both_and_the_place_kept():
    saved = Sampler(Numbers(name="old"), global_batch_size=2, micro_batch_size=1)
    saved.take(2)
    sampler = Sampler(Numbers(name="new"), global_batch_size=2, micro_batch_size=1)
    with pytest.raises(DataError, match=r"old-0.*new-0"):
        sampler.load_state_dict(saved.state_dict())
    assert (sampler.epoch, sampler.index) == (0, 0)


def test_place_outside_its_epoch_is_refused():
    sampler = Sampler(Numbers(7), global_batch_size=1, micro_batch_size=1)
    sampler.load_state_dict({"epoch": 1, "index": 8, "pack_index_sha256": "a-1"})  # used up, not yet left
    assert sampler.take(1) == [(2, 0)]
    for index in (-1, 9):
        with pytest.raises(DataError, match=f"sample {index} of epoch 1, which has 8"):
            sampler.load_state_dict({"epoch": 1, "index": index, "pack_index_sha256": "a-1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"global_batch_size": 6, "micro_batch_size": 2, "dp_size": 2},
            r"6 is not a multiple of .* 2 \* 2 = 4",
        ),
        ({"global_batch_size": 0, "micro_batch_size": 1}, "global_batch_size = 0"),
        ({"global_batch_size": 1, "micro_batch_size": 0}, "micro_batch_size = 0"),
        ({"global_batch_size": 2, "micro_batch_size": 1, "dp_rank": 2, "dp_size": 2}, "dp_rank = 2"),
    ],
)
def test_layout_that_does_not_divide_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Numbers(), **arguments)


def test_micro_batches_are_stacked():
    numbers = Numbers(7)
    sampler = Sampler(numbers, global_batch_size=8, micro_batch_size=2, dp_rank=1, dp_size=2)
    batches = micro_batches(sampler, numbers, 8)
    assert [batch["tokens"].tolist() for batch in batches] == [[[0, 2], [0, 3]], [[0, 6], [1, 0]]]
    assert batches[0]["loss_mask"].shape == (2, 2)


def test_collate_keeps_types():
    batch = collate([Numbers().sample(0, 0), Numbers().sample(0, 1)])
    assert {name: value.dtype for name, value in batch.items()} == {
        "tokens": torch.int64,
        "loss_mask": torch.float32,
    }


@settings(deadline=None)
@given(
    base=st.integers(1, 12),
    micro=st.integers(1, 4),
    dp=st.integers(1, 3),
    limit=st.none() | st.integers(1, 20),
)
def test_held_out_reads_each_sample_once_over_all_ranks(base, micro, dp, limit):
    read = [
        index
        for rank in range(dp)
        for batch in held_out(
            Numbers(base), micro_batch_size=micro, max_samples=limit, dp_rank=rank, dp_size=dp
        )
        for _, index in batch["tokens"].tolist()
    ]
    assert sorted(read) == list(range(base if limit is None else min(base, limit)))


def test_two_runs_over_real_files_read_the_same_tensors(kd_payload, tmp_path):
    """The whole path: straight through on one rank against stopped and resumed on two."""
    payload = kd_payload(train=[[9, 20, 31, 14, 8, 25, 17, 30, 6, 11]])

    def dataset(cache):
        return PackedDataset(
            SpanDocuments(payload.root, "train"), seq_len=32, block=4, seed=1, cache_dir=tmp_path / cache
        )

    def sampler(cache, rank=0, size=1):
        return Sampler(dataset(cache), global_batch_size=4, micro_batch_size=1, dp_rank=rank, dp_size=size)

    straight = sampler("one")
    steps = [micro_batches(straight, dataset("one"), 4) for _ in range(5)]
    assert straight.epoch > 0
    first = sampler("two")
    for _ in range(2):
        first.take(4)
    ranks = [sampler("two", rank, 2) for rank in range(2)]
    for each in ranks:
        each.load_state_dict(first.state_dict())
    for expected in steps[2:]:
        parts = [micro_batches(each, dataset("two"), 4) for each in ranks]
        found = [batch for pair in zip(*parts, strict=True) for batch in pair]
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
    other = PackedDataset(
        SpanDocuments(payload.root, "train"), seq_len=32, block=4, seed=2, cache_dir=tmp_path
    )
    with pytest.raises(DataError, match="pack index"):
        Sampler(other, global_batch_size=4, micro_batch_size=1).load_state_dict(straight.state_dict())


@settings(deadline=None, max_examples=40)
@given(present=st.lists(st.sets(st.sampled_from(sorted(FILLERS))), min_size=1, max_size=4), data=st.data())
def test_what_only_some_samples_have_is_filled_in_the_others_and_what_none_has_is_not_there(present, data):
    shapes = {name: data.draw(st.sampled_from([(3,), (3, 2), (3, 0)])) for name in FILLERS}
    dtypes = {name: torch.tensor(filler).dtype for name, filler in FILLERS.items()}

    def sample(number, names):
        fields = {name: torch.full(shapes[name], number + 5).to(dtypes[name]) for name in names}
        return {"tokens": torch.full((3,), number)} | fields

    samples = [sample(number, names) for number, names in enumerate(present)]
    batch = collate(samples)
    assert set(batch) == {"tokens"}.union(*present)
    for name in set(batch) - {"tokens"}:
        for number, names in enumerate(present):
            expected = samples[number].get(name)
            if expected is None:
                expected = torch.full(shapes[name], FILLERS[name])
            assert batch[name].dtype == dtypes[name]
            assert torch.equal(batch[name][number], expected.to(dtypes[name])), name
            assert (name in names) == (name in samples[number])


def test_a_field_that_every_sample_must_have_is_never_made_up():
    whole = Numbers().sample(0, 0)
    with pytest.raises(KeyError, match="loss_mask"):
        collate([whole, {"tokens": whole["tokens"]}])
