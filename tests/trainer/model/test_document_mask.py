"""Who sees whom in a packed row, against a loop over pairs; and the reach that the decoding cache shares."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model.document_mask import PADDING, document_mask, within_reach

ROWS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
WINDOWS = st.one_of(st.none(), st.integers(1, 6))


def packed(lengths, padding):
    """Documents 0, 1, … of these lengths, then padding."""
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids + [PADDING] * padding])


@settings(deadline=None)
@given(lengths=ROWS, padding=st.integers(0, 3), window=WINDOWS, first=st.integers(0, 3))
def test_a_token_sees_itself_and_its_own_document_before_it(lengths, padding, window, first):
    doc = packed(lengths, padding)
    row = doc[0].tolist()
    queries, keys = range(min(first, len(row) - 1), len(row)), range(len(row))
    mask = document_mask(torch.tensor(queries), torch.tensor(keys), doc, window)[0]
    for (at, i), (to, j) in itertools.product(enumerate(queries), enumerate(keys)):
        sees = i == j or (
            row[i] == row[j] != PADDING and j < i and (window is None or j in range(i - window + 1, i + 1))
        )
        assert bool(mask[at, to]) == sees, (row, window, i, j)


@given(lengths=ROWS, window=WINDOWS)
def test_inside_one_document_the_mask_is_the_reach(lengths, window):
    size = sum(lengths)
    places = torch.arange(size)
    alone = document_mask(places, places, torch.zeros(1, size, dtype=torch.int64), window)[0]
    assert torch.equal(alone, within_reach(places[:, None] - places[None, :], window))
