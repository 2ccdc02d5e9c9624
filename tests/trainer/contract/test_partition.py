from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.partition import Unit, elementwise_unit, matrix_unit, plan

units = st.lists(
    st.builds(Unit, rows=st.integers(1, 40), cost=st.integers(1, 1000), even=st.booleans()), max_size=20
)


@given(units=units, ranks=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_row_has_one_owner_and_shares_are_contiguous_in_rank_order(units, ranks):
    shares = plan(units, ranks)
    for index, unit in enumerate(units):
        own = [share for share in shares if share.unit == index]
        assert [share.start for share in own] == [0, *(share.stop for share in own[:-1])]
        assert own[-1].stop == unit.rows
        assert all(share.start < share.stop for share in own)
        assert [share.owner for share in own] == sorted({share.owner for share in own})
    assert plan(list(units), ranks) == shares


@given(
    units=st.lists(st.builds(Unit, rows=st.integers(1, 40), cost=st.integers(1, 1000)), min_size=1),
    ranks=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_no_rank_has_more_than_its_part_plus_one_row(units, ranks):
    load = [0] * ranks
    for share in plan(units, ranks):
        load[share.owner] += (share.stop - share.start) * units[share.unit].cost
    total = sum(unit.rows * unit.cost for unit in units)
    assert max(load) <= total / ranks + max(unit.cost for unit in units)


def test_the_full_model_is_balanced_over_eight_ranks_within_a_percent():
    shapes = [(256, 128, 1024), (256, 1024, 128)] * 79 + [(1024, 1024)] * 80 + [(1536, 1024)] * 20
    shapes += [(32, 1024), (4, 1024), (512, 1024)] * 60 + [(256, 1024)] * 79
    units = [matrix_unit(shape) for shape in shapes]
    work, memory = [0] * 8, [0] * 8
    for share in plan(units, 8):
        rows = share.stop - share.start
        work[share.owner] += rows * units[share.unit].cost
        memory[share.owner] += rows * shapes[share.unit][-1] * shapes[share.unit][-2]
    assert max(work) < 1.01 * min(work)
    assert max(memory) < 1.05 * min(memory)


def test_cost_is_that_of_the_gram_products_and_does_not_depend_on_the_tensor_split():
    assert matrix_unit((128, 1024)) == Unit(1, 128 * 1024 * 128)
    assert matrix_unit((256, 1024, 128)) == Unit(256, 128 * 1024 * 128)


def test_large_tables_are_split_by_rows_and_small_tensors_stay_whole():
    assert elementwise_unit((201088, 64)) == Unit(201088, 64, even=True)
    assert elementwise_unit((256, 128)) == Unit(1, 256 * 128)
    assert elementwise_unit(()) == Unit(1, 1)
    sizes = [share.stop - share.start for share in plan([elementwise_unit((201088, 64))], 3)]
    assert sum(sizes) == 201088
    assert max(sizes) - min(sizes) <= 1
