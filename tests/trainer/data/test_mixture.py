"""Conversations and text in one order: exact shares, nothing lost, one order for every layout."""

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS, SCORED, TEXT
from trainer.contract.mix import Mix
from trainer.data.mixture import MixtureSampler, Place, first_before
from trainer.data.sampler import Walk
from trainer.errors import DataError


class Numbers:
    """A source of known size; epoch e has ``base + e`` samples."""

    def __init__(self, base, name):
        self.base, self.name = base, name

    def num_samples(self, epoch):
        return self.base + epoch

    def pack_index_sha256(self, epoch):
        return f"{self.name}-{epoch}"


def sampler(share, size=4, bases=(5, 7), micro=1, rank=0, dp=1, name="a"):
    given_sources = {CONVERSATIONS: Numbers(bases[0], f"c{name}"), TEXT: Numbers(bases[1], f"t{name}")}
    mix = Mix(CONVERSATIONS, share, TEXT)
    sources = {part: given_sources[part] for part in mix.kinds}
    return MixtureSampler(
        sources, mix, global_batch_size=size, micro_batch_size=micro, dp_rank=rank, dp_size=dp
    )


def walk(base, count):
    """The definition of one data set's order: its epochs one after the other."""
    order, epoch = [], 0
    while len(order) < count:
        order += [(epoch, index) for index in range(base + epoch)]
        epoch += 1
    return order[:count]


shares = st.fractions(0, 1, max_denominator=20).map(lambda f: round(float(f), 3))


@settings(deadline=None)
@given(
    share=shares, size=st.integers(1, 9), steps=st.integers(1, 12), bases=st.tuples(*[st.integers(1, 9)] * 2)
)
def test_any_first_samples_hold_their_share_and_each_data_set_is_walked_in_its_own_order(
    share, size, steps, bases
):
    drawn = sampler(share, size, bases)
    places = [place for _ in range(steps) for place in drawn.next_batch()]
    assert len(places) == size * steps
    for part, base in zip((CONVERSATIONS, TEXT), bases, strict=True):
        own = [(place.epoch, place.number) for place in places if place.part == part]
        assert own == walk(base, len(own)), "in order, nothing left out, nothing twice"
    exact = Fraction(str(share))
    for n in range(len(places) + 1):
        conversations = sum(place.part == CONVERSATIONS for place in places[:n])
        assert abs(conversations - n * exact) <= Fraction(1, 2)


@settings(deadline=None)
@given(share=shares, periods=st.integers(1, 5), start=st.integers(0, 10**12))
def test_every_period_of_the_share_is_exact_wherever_it_begins(share, periods, start):
    exact = Fraction(str(share))
    n = exact.denominator * periods
    found = first_before(start + n, share) - first_before(start, share)
    assert found == exact.numerator * periods


@settings(deadline=None, max_examples=40)
@given(base=st.integers(1, 60), share=st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.8]))
def test_an_epoch_of_conversations_goes_with_its_share_of_text(base, share):
    """From the first conversation of the epoch to the last, the text between them is what the share says."""
    drawn = sampler(share, size=1, bases=(base, 10**6))
    places = []
    while not places or places[-1] != Place(CONVERSATIONS, 0, base - 1):
        places += drawn.next_batch()
    text = sum(place.part == TEXT for place in places)
    assert abs(text - base * (1 - share) / share) <= 1 / share


def test_a_fifth_of_conversations_is_spread_evenly():
    drawn = sampler(0.2)
    kinds = [place.part for _ in range(5) for place in drawn.next_batch()]
    assert "".join("c" if kind == CONVERSATIONS else "." for kind in kinds) == "..c....c....c....c.."


@settings(deadline=None)
@given(
    share=shares,
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    dp=st.integers(1, 4),
    steps=st.integers(1, 4),
)
def test_every_layout_reads_the_same_batches(share, micro, accumulation, dp, steps):
    size = micro * accumulation * dp
    ranks = [sampler(share, size, micro=micro, rank=rank, dp=dp) for rank in range(dp)]
    alone = sampler(share, size)
    for _ in range(steps):
        expected = alone.next_batch()
        parts = [each.share(each.next_batch()) for each in ranks]
        assert [place for side in zip(*parts, strict=True) for part in side for place in part] == expected


@settings(deadline=None)
@given(share=shares, before=st.integers(0, 9), dp=st.sampled_from([1, 2, 4]))
def test_a_resumed_mixture_goes_on_as_if_nothing_had_happened(share, before, dp):
    straight = sampler(share)
    for _ in range(before):
        straight.next_batch()
    state = json.loads(json.dumps(straight.state_dict()))
    assert all(set(walked) == {"epoch", "index", "pack_index_sha256"} for walked in state.values())
    assert set(state) == set(Mix(CONVERSATIONS, share, TEXT).kinds)
    resumed = sampler(share, rank=dp - 1, dp=dp)
    resumed.load_state_dict(state, steps=before)
    assert [resumed.next_batch() for _ in range(5)] == [straight.next_batch() for _ in range(5)]


@pytest.mark.parametrize(("share", "part", "base"), [(1.0, CONVERSATIONS, 5), (0.0, TEXT, 7)])
def test_a_share_of_one_or_nothing_walks_one_data_set_alone(share, part, base):
    drawn = sampler(share)
    places = [place for _ in range(4) for place in drawn.next_batch()]
    assert places == [Place(part, *address) for address in walk(base, 16)]
    assert set(drawn.state_dict()) == {part}


def test_other_data_of_either_kind_are_refused():
    saved = sampler(0.5, name="old")
    saved.next_batch()
    with pytest.raises(DataError, match=r"cold-0.*cnew-0"):
        sampler(0.5, name="new").load_state_dict(saved.state_dict(), steps=1)
    state = sampler(0.5, name="new").state_dict() | {TEXT: saved.state_dict()[TEXT]}
    with pytest.raises(DataError, match=r"told-0.*tnew-0"):
        sampler(0.5, name="new").load_state_dict(state, steps=1)


@pytest.mark.parametrize(
    ("share", "sources", "message"),
    [
        (0.2, (TEXT,), "needs conversations and text, found text"),
        (1.0, (CONVERSATIONS, TEXT), "needs conversations, found conversations and text"),
        (0.0, (), "needs text, found nothing"),
        (1.5, (CONVERSATIONS,), r"must be in \[0, 1\]"),
    ],
)
def test_sources_that_do_not_fit_the_share_are_refused(share, sources, message):
    with pytest.raises(ValueError, match=message):
        MixtureSampler(
            {name: Numbers(5, name) for name in sources},
            Mix(CONVERSATIONS, share, TEXT),
            global_batch_size=4,
            micro_batch_size=1,
        )


class Written(Walk):
    """A kind without a data set: its samples are numbered as they are written."""

    epoch = 0

    def __init__(self):
        self.made = 0

    def take(self, count):
        self.made += count
        return [(0, number) for number in range(self.made - count, self.made)]

    def state_dict(self):
        return {"made": self.made}

    def load_state_dict(self, state):
        self.made = state["made"]


@settings(deadline=None, max_examples=40)
@given(share=shares, size=st.integers(1, 6), steps=st.integers(0, 6))
def test_two_kinds_of_one_data_set_keep_their_places_apart_whatever_walks_them(share, size, steps):
    def drawn():
        mix = Mix(CONVERSATIONS, share, ROLLOUTS)
        walks = {CONVERSATIONS: Numbers(5, "same"), ROLLOUTS: Written()}
        return MixtureSampler(
            {kind: walks[kind] for kind in mix.kinds}, mix, global_batch_size=size, micro_batch_size=1
        )

    straight, resumed = drawn(), drawn()
    before = [place for _ in range(steps) for place in straight.next_batch()]
    for kind in straight.state_dict():
        own = [place for place in before if place.part == kind]
        assert own == [
            Place(kind, *at)
            for at in (
                walk(5, len(own)) if kind == CONVERSATIONS else [(0, number) for number in range(len(own))]
            )
        ]
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())), steps=steps)
    assert [resumed.next_batch() for _ in range(3)] == [straight.next_batch() for _ in range(3)]


def test_the_first_kind_of_a_mix_is_the_one_that_its_share_spreads():
    scored = MixtureSampler(
        {SCORED: Numbers(9, "s"), CONVERSATIONS: Numbers(9, "c")},
        Mix(SCORED, 0.2, CONVERSATIONS),
        global_batch_size=20,
        micro_batch_size=1,
    )
    kinds = [place.part for place in scored.next_batch()]
    assert "".join("s" if kind == SCORED else "." for kind in kinds) == "..s....s....s....s.."
