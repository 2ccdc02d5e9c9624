"""What the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def named_paths(text: str) -> set[str]:
    """Paths of the project in code spans; those with a placeholder (`<word>`, NAME) name no file."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return {
        span
        for span in spans
        if re.fullmatch(r"(trainer|vpmoe_assets|tests|docs|configs)/[a-z0-9_./-]*", span)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document):
    missing = {path for path in named_paths(document.read_text()) if not (ROOT / path).exists()}
    assert not missing


def test_the_documents_do_name_files():
    assert len(named_paths((ROOT / "CONTRIBUTING.md").read_text())) > 10


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
