"""The random edits are of the kind that they are said to be."""

import ast
import random

import pytest

from tests.codebase import edits
from vpmoe_assets.codebase.syntax import parse, tree_digest
from vpmoe_assets.codebase.tree import SourceTree


@pytest.mark.parametrize("edit", [edits.says_nothing, edits.constant, edits.new_import, edits.default])
def test_an_edit_parses_and_says_another_thing_where_it_is_to(edit: edits.Edit, tree: SourceTree) -> None:
    rng = random.Random(7)
    paths = [path for path in tree.content if path.endswith(".py")]
    made = 0
    while made < 60:
        text = tree.content[path := rng.choice(paths)].decode()
        edited = edit(rng, text)
        if edited is not None:
            made += 1
            assert edited != text, path
            same = tree_digest(parse(edited.encode(), path)) == tree_digest(ast.parse(text))
            assert same == (edit is edits.says_nothing), f"{path}:\n{edited}"
