"""Templates are compiled once, and again when they change."""

import sys

import pytest

from vpmoe_assets.browse import compiled


@pytest.fixture
def templates(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("{{ word | loud }} {{ mark }}")
    monkeypatch.setattr(compiled, "TEMPLATES", tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path


def page() -> str:
    made = compiled.environment({"loud": str.upper}, {"mark": "!"})
    return made.get_template("page.html").render(word="<b>")


def test_what_was_compiled_is_used_until_the_template_changes(templates, monkeypatch):
    assert page() == "&lt;B&gt; !"
    (kept,) = (templates / "__pycache__").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compiled.Environment, "compile", None)  # nothing is compiled a second time
        assert page() == "&lt;B&gt; !"
    (templates / "page.html").write_text("{{ mark }}")
    assert page() == "!"
    kept.write_bytes(b"torn")
    assert page() == "!"


def test_nothing_is_kept_where_it_cannot_or_may_not_be(templates, monkeypatch):
    (templates / "__pycache__").write_text("a file")
    assert page() == "&lt;B&gt; !"
    (templates / "__pycache__").unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert page() == "&lt;B&gt; !"
    assert not (templates / "__pycache__").exists()
