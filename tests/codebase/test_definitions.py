import pytest

from vpmoe_assets.codebase.definitions import changed_definitions
from vpmoe_assets.codebase.syntax import SourceError

OLD = b'''"""A module."""
import os
A = 1
B: int = 2

def f(x):
    """Says."""
    return x

class C:
    size = 1

    def m(self):
        return 1

    def n(self):
        return 2
'''


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (b"return x", b"return x  # a comment", ()),
        (b"Says", b"Says another thing", ()),
        (b"return x", b"return -x", ("f",)),
        (b"return 1", b"return 3", ("C.m",)),
        (b"size = 1", b"size = 2", ("C",)),
        (b"class C:", b"class C(object):", ("C",)),
        (b"import os", b"import os, sys", ("imports",)),
        (b"A = 1", b"A = 3", ("A",)),
        (b"B: int = 2", b"B: int = 4", ("B",)),
        (b"def f(x)", b"def g(x)", ("g", "f")),
        (b"A = 1", b"A = 1\nif A:\n    A = 2", ("top level",)),
    ],
)
def test_what_says_another_thing_is_named(old, new, names):
    assert OLD.count(old) == 1
    assert changed_definitions(OLD, OLD.replace(old, new), "a.py") == names


def test_a_file_that_does_not_parse_is_named():
    with pytest.raises(SourceError, match=r"a\.py"):
        changed_definitions(OLD, b"def", "a.py")
