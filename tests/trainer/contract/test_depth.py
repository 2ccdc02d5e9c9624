"""The rule of the depth step, against the published map of the ladder and its own promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.depth import BLOCK_LAYERS, inserted_layers, layer_origins


def test_from_28_to_80_layers_old_blocks_land_where_the_ladder_says():
    origins = layer_origins(28, 80)
    old = [place // 4 for place in range(0, 80, 4) if not origins[place].inserted]
    assert old == [0, 2, 5, 8, 11, 14, 17]
    new = {(number - 1) // 4 for number in inserted_layers(28, 80)}
    assert new == {1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19}
    assert len(inserted_layers(28, 80)) == 52
    assert [origins[place].source for place in (0, 3, 4, 7, 8, 12, 16, 20, 79)] == [
        1,
        4,
        1,
        4,
        5,
        5,
        5,
        9,
        28,
    ]


def test_from_8_to_16_layers_every_other_block_is_new():
    assert inserted_layers(8, 16) == (5, 6, 7, 8, 13, 14, 15, 16)


@given(old=st.integers(1, 12), more=st.integers(0, 30))
def test_every_old_layer_is_there_once_in_order_and_every_layer_keeps_its_place_in_a_block(old, more):
    parent, target = BLOCK_LAYERS * old, BLOCK_LAYERS * (old + more)
    origins = layer_origins(parent, target)
    assert len(origins) == target
    assert [o.source for o in origins if not o.inserted] == list(range(1, parent + 1))
    assert origins[0].source == 1
    assert not origins[0].inserted
    nearest = {}
    for number, origin in enumerate(origins, start=1):
        within = (number - 1) % BLOCK_LAYERS
        assert (origin.source - 1) % BLOCK_LAYERS == within
        if origin.inserted:
            assert origin.source == nearest[within], "a new layer copies the nearest old block before it"
        nearest[within] = origin.source


@pytest.mark.parametrize(
    ("parent", "target", "message"),
    [
        (6, 8, "the parent has num_layers = 6"),
        (8, 10, "the target has num_layers = 10"),
        (0, 8, "num_layers = 0"),
        (16, 8, "less than the parent's 16"),
    ],
)
def test_depths_that_the_rule_does_not_cover_are_refused(parent, target, message):
    with pytest.raises(ValueError, match=message):
        layer_origins(parent, target)
