"""The code of one function: what it says and uses, and nothing else of its module."""

from pathlib import Path

import pytest

from vpmoe_assets.codebase.definition import Definition, definition
from vpmoe_assets.codebase.tree import SourceTree

CHECKS = '''
"""Checks."""

from vpmoe_assets.checks.check import check
from vpmoe_assets.checks.shared import LIMIT, lower
from vpmoe_assets.library import audit
from vpmoe_assets.library.reading import read

MOST = 5
UNUSED = 1


@check("rows", blocking=False)
def rows(item, inputs):
    """Rows are there."""
    return read(item) < least(item)


def least(item):
    return MOST


@check("audited")
def audited(item, inputs):
    from vpmoe_assets.library import late

    return audit.holds(item) and late.holds(item)


def given(most):
    @check("given")
    def found(item, inputs):
        return lower(item, most) < LIMIT

    return found
'''
FILES = {
    "vpmoe_assets/__init__.py": "",
    "vpmoe_assets/checks/__init__.py": "",
    "vpmoe_assets/checks/check.py": "def check(name, **more):\n    return lambda function: function\n",
    "vpmoe_assets/checks/data.py": CHECKS,
    "vpmoe_assets/checks/shared.py": """
LIMIT = 3

def lower(x, y):
    return x - y

def other():
    pass
""",
    "vpmoe_assets/library/__init__.py": "",
    "vpmoe_assets/library/audit.py": """
from vpmoe_assets.library import deep

def holds(x):
    return deep.X
""",
    "vpmoe_assets/library/deep.py": "X = 1\n",
    "vpmoe_assets/library/late.py": "def holds(x):\n    return True\n",
    "vpmoe_assets/library/reading.py": "def read(x):\n    return 1\n",
}
FUNCTIONS = ("rows", "audited", "given")


@pytest.fixture
def code(tmp_path):
    """Write the project with each text of ``changes`` in place of another, and read what it says."""

    def read(changes: dict[str, tuple[str, str]] | None = None) -> dict[str, Definition]:
        for path, text in FILES.items():
            old, new = (changes or {}).get(path, ("", ""))
            assert old in text
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.replace(old, new) if old else text)
        tree = SourceTree(Path(tmp_path))
        return {name: found(tree, name) for name in FUNCTIONS}

    return read


def found(tree: SourceTree, name: str, module: str = "vpmoe_assets.checks.data") -> Definition:
    return definition(tree, module, name, decorator="check", followed=("vpmoe_assets.checks",))


def changed(code, path: str, old: str, new: str) -> set[str]:
    before, after = code(), code({f"vpmoe_assets/{path}": (old, new)})
    return {name for name in FUNCTIONS if before[name].digest != after[name].digest}


def test_a_definition_is_itself_what_it_uses_and_the_closures_of_what_that_imports(code):
    read = code()
    assert list(read["rows"].parts) == [
        "vpmoe_assets.checks.data:",
        "vpmoe_assets.checks.data:MOST",
        "vpmoe_assets.checks.data:least",
    ]
    assert read["rows"].closure.roots == ("vpmoe_assets.library.reading",)
    assert "vpmoe_assets/library/deep.py" in read["audited"].closure.sources
    assert "vpmoe_assets/library/late.py" in read["audited"].closure.sources
    assert list(read["given"].parts) == [
        "vpmoe_assets.checks.data:",
        "vpmoe_assets.checks.shared:LIMIT",
        "vpmoe_assets.checks.shared:lower",
    ]
    assert read["given"].closure is None


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("checks/data.py", "return read(item) <", "return read(item) <=", {"rows"}),
        ("checks/data.py", "MOST = 5", "MOST = 6", {"rows"}),
        ("checks/data.py", "return MOST", "return MOST + 1", {"rows"}),
        ("checks/data.py", "< LIMIT", "<= LIMIT", {"given"}),
        ("checks/shared.py", "LIMIT = 3", "LIMIT = 4", {"given"}),
        ("checks/shared.py", "x - y", "y - x", {"given"}),
        ("library/deep.py", "X = 1", "X = 2", {"audited"}),
        ("library/late.py", "True", "False", {"audited"}),
        ("library/reading.py", "return 1", "return 2", {"rows"}),
        # And what says nothing to any of them:
        ("checks/data.py", "UNUSED = 1", "UNUSED = 2", set()),
        ("checks/data.py", '"""Rows are there."""', '"""All rows."""', set()),
        ("checks/data.py", '@check("rows", blocking=False)', '@check("row_count")', set()),
        ("checks/data.py", '    @check("given")', '    @check("bounded", blocking=False)', set()),
        ("checks/data.py", "    return MOST", "    # a comment\n    return MOST", set()),
        ("checks/shared.py", "    pass", "    return 1", set()),
        ("checks/check.py", "function\n", "(function)\n", set()),
        ("checks/check.py", "**more", "*more", set()),
    ],
)
def test_an_edit_changes_those_that_use_it_and_no_other(code, path, old, new, expected):
    assert changed(code, path, old, new) == expected


def test_the_name_of_the_function_says_nothing(code, tmp_path):
    before = code()["rows"]
    path = tmp_path / "vpmoe_assets" / "checks" / "data.py"
    path.write_text(CHECKS.replace("def rows(", "def row_count("))
    assert found(SourceTree(tmp_path), "row_count").digest == before.digest


def test_what_is_not_there_is_refused(code, tmp_path):
    code()
    with pytest.raises(LookupError, match="defines no absent at its top level"):
        found(SourceTree(tmp_path), "absent")
    with pytest.raises(LookupError, match="no module below"):
        found(SourceTree(tmp_path), "rows", "vpmoe_assets.checks.absent")
