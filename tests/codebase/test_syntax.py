import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.codebase.syntax import SourceError, parse, tree_digest

ROOT = Path(__file__).parents[2]
EVERYTHING = Path(__file__).with_name("every_syntax.py.txt")
GOLDEN = "840eefcd0ba6ae108a52b34d5e0a80386894610ab3759c91e60fb032ff3b0793"


def digest(source: str) -> str:
    return tree_digest(parse(source.encode(), "example.py"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1\n", "# why\nx = 1  # one\n"),
        ("x = 1\n", '"""Says what."""\nx = 1\n'),
        ("def f():\n    return 1\n", 'def f():\n    """One."""\n    return 1\n'),
        ("class A:\n    x = 1\n", 'class A:\n    """A."""\n    x = 1\n    """Of A."""\n'),
        (
            "def f(a, b): return [a, b]",
            "def f(\n    a,\n    b,\n):\n    return [\n        a,\n        b,\n    ]\n",
        ),
        ("x = 'a' \"b\"", 'x = u"ab"'),
        ("x = 1_000", "x = 0x3E8"),
        ("", '"""Says what."""'),
        ("class A: ...", 'class A:\n    """A."""\n    ...'),
        ("x = (1)", "x = 1"),
        ("x = 1; y = 2", "x = 1\n\n\ny = 2"),
        ("x = []  # type: list[int]", "x = []"),
        ("x = f'{y:}'", "x = f'{y}'"),
        ("x = f'a' 'b' f'{y}c' 'd'", "x = f'ab{y}cd'"),
        ("if a:\n    b\nelif c:\n    d", "if a:\n    b\nelse:\n    if c:\n        d"),
    ],
)
def test_what_says_the_same_has_one_digest(one: str, other: str) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = None", "x = ..."),
        ("x = 'a'", "x = b'a'"),
        ("x = 0.1", "x = 0.10000000000000002"),
        ("x: int = 1", "x: float = 1"),
        ("def f(a=1): ...", "def f(a=2): ..."),
        ("def f(a, /): ...", "def f(a): ..."),
        ("def f(*, a=None): ...", "def f(*, a): ..."),
        ("def f() -> int: ...", "def f() -> str: ..."),
        ("import a", "import a\nimport b"),
        ("return_ = None", "return_ = [None]"),
        ("def f(): return None", "def f(): return"),
        ("x = {**a}", "x = {None: a}"),
        ("x = f'{y!r}'", "x = f'{y!s}'"),
        ("x = f'{y:>3}'", "x = f'{y:>4}'"),
        ("x = ['ab', 'c']", "x = ['a', 'bc']"),
        ("x = a[1:]", "x = a[:1]"),
        ("x = 'says'", "'says'"),
        ("async def f(): ...", "def f(): ..."),
        ("f('text')", "f()"),
    ],
)
def test_what_says_another_thing_has_another_digest(one: str, other: str) -> None:
    assert digest(one) != digest(other)


def test_a_digest_is_that_of_a_golden_file() -> None:
    assert tree_digest(parse(EVERYTHING.read_bytes(), EVERYTHING.name)) == GOLDEN


def _pythons() -> list[str]:
    """Python 3.13, wherever this machine has it."""
    homes = [
        Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv"),
        Path.home() / ".local/share/uv/python",
    ]
    found = [shutil.which("python3.13")]
    for home in homes:
        found += [str(path) for path in sorted(home.glob("**/bin/python3.13"))] if home.is_dir() else []
    return [path for path in found if path and _runs(path)]


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def test_another_python_has_the_same_digests() -> None:
    """The golden file's, and every source's of this project."""
    pythons = _pythons()
    if not pythons:
        pytest.skip("no Python 3.13 on this machine: digests were compared under one Python only")
    program = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('syntax', sys.argv[1])\n"
        "syntax = importlib.util.module_from_spec(spec); spec.loader.exec_module(syntax)\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    print(syntax.tree_digest(syntax.parse(pathlib.Path(line).read_bytes(), line)))\n"
    )
    files = [
        EVERYTHING,
        *(path for name in ("trainer", "vpmoe_assets") for path in (ROOT / name).rglob("*.py")),
    ]
    syntax = str(ROOT / "vpmoe_assets/codebase/syntax.py")
    outputs = [
        subprocess.run(
            [python, "-c", program, syntax],
            input="\n".join(map(str, files)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for python in (sys.executable, pythons[0])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == GOLDEN


def test_a_file_that_does_not_parse_is_named() -> None:
    with pytest.raises(SourceError, match=r"trainer/model/gpt\.py is no Python"):
        parse(b"def f(:\n", "trainer/model/gpt.py")


@given(st.text(), st.text())
def test_texts_that_differ_have_digests_that_differ(one: str, other: str) -> None:
    def of(text: str) -> str:
        return tree_digest(ast.Module([ast.Assign([ast.Name("x", ast.Store())], ast.Constant(text))], []))

    assert (of(one) == of(other)) == (one == other)


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\f\x00"), max_size=30), max_size=5)
)
def test_comments_between_the_lines_change_nothing(comments: list[str]) -> None:
    plain = "def f(x):\n    y = x + 1\n    return y\n"
    lines = plain.splitlines()
    for place, comment in enumerate(comments):
        lines.insert(place % len(lines), f"        # {comment}")
    assert digest("\n".join(lines)) == digest(plain)
