from trainer.contract.differences import differences, leaves


def test_leaves_have_dotted_paths_and_lists_are_leaves():
    tree = {"model": {"hidden": 8, "skip": [1, 0]}, "seed": None}
    assert list(leaves(tree)) == [("model.hidden", 8), ("model.skip", [1, 0]), ("seed", None)]


def test_differences_are_sorted_and_hold_both_values():
    one = {"b": {"x": 1, "y": 2}, "a": 1, "same": {"z": [1]}}
    other = {"b": {"x": 3}, "c": 4, "a": 1, "same": {"z": [1]}}
    found = differences(one, other)
    assert list(found.items()) == [("b.x", (1, 3)), ("b.y", (2, None)), ("c", (None, 4))]
    assert differences(one, one) == {}
