import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model import pair_sort


def require_sorted(found: pair_sort.SortedPairs, chosen: torch.Tensor, experts: int) -> None:
    expected = sorted(range(len(chosen)), key=lambda pair: int(chosen[pair]))
    assert found.order.tolist() == expected
    assert [expected[row] for row in found.inverse.tolist()] == list(range(len(chosen)))
    assert found.offsets.tolist() == [int((chosen <= e).sum()) for e in range(experts)]
    assert found.expert.tolist() == [min(int(chosen[pair]), experts - 1) for pair in expected]


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 7), pairs=st.integers(1, 40), seed=st.integers(0, 999))
def test_pairs_are_sorted_stably_with_nobodys_last(experts, pairs, seed):
    chosen = torch.randint(0, experts + 1, (pairs,), generator=torch.Generator().manual_seed(seed))
    require_sorted(pair_sort.sort_pairs(chosen, experts), chosen, experts)


@pytest.mark.parametrize(("experts", "pairs"), [(5, 30), (1, 1), (3, 4100)])
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only")
def test_the_kernel_sorts_as_the_library_does(experts, pairs):
    chosen = torch.randint(0, experts + 1, (pairs,), generator=torch.Generator().manual_seed(1))
    require_sorted(pair_sort._counted(chosen, experts), chosen, experts)
