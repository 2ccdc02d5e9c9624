"""What no linter checks about the text of docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "vpmoe_assets", "benchmarks")


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield place and text of every docstring of the product, those of attributes included."""
    for file in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", text


def test_no_module_of_the_product_is_longer_than_can_be_read_at_once():
    """A module of more than some 500 lines holds two things."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 300
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > 500} == {}


def test_docstrings_use_one_markup():
    """Markdown's single backticks: the UI shows asset docstrings as Markdown, and roles are noise there."""
    found = dict(docstrings())
    assert len(found) > 500
    doubled = [place for place, text in found.items() if re.search(r"(?<!`)``(?!`)", text)]
    roles = [place for place, text in found.items() if re.search(r":(func|class|meth|mod|attr|data):`", text)]
    assert not doubled, "write `x`, not ``x``"
    assert not roles, "write `module.name`, without a role"
