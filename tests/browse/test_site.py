"""The pages as files: every link leads to a file, and nothing of others is touched."""

from urllib.parse import unquote

import pytest

from tests.browse.test_pages import Shape
from vpmoe_assets.browse.site import MARK, SiteError, chosen, refuse_inside, write_site


@pytest.fixture(scope="module")
def written(pages, tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "appendix"
    write_site(pages, out, chosen(pages.catalog, "smoke", ["ladder_report", "vpmoe_stage1"]))
    return out


def test_every_link_of_every_page_leads_to_a_file_beside_it(written):
    pages = list(written.rglob("index.html"))
    assert len(pages) > 10
    for page in pages:
        for link in Shape(page.read_text()).links:
            if link.startswith("#"):
                continue
            target = (page.parent / unquote(link)).resolve()
            assert target.is_file(), f"{page}: {link}"
            assert target.is_relative_to(written.resolve())


def test_a_site_has_what_was_asked_for_and_what_that_came_from(written, small):
    there = {path.parent.name for path in written.glob("smoke/*/index.html")} | {
        path.parent.name for path in written.glob("smoke/*/2*/index.html")
    }
    assert small.second.version in there
    assert small.kd.version in there
    assert small.first.version not in there
    assert "refused" not in there


def test_a_site_is_written_anew_and_other_files_are_not_replaced(pages, small, written, tmp_path):
    heads = chosen(pages.catalog, "smoke", ["synth"])
    (written / "smoke" / "of-before").mkdir()
    write_site(pages, written, heads)
    assert not (written / "smoke" / "of-before").exists()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SiteError, match="holds something else"):
        write_site(pages, tmp_path, heads)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / MARK).exists()


def test_a_site_of_what_was_never_published_or_inside_the_store_is_refused(pages, small):
    with pytest.raises(SiteError, match="nonesuch is not in the store; there is: "):
        chosen(pages.catalog, "smoke", ["nonesuch"])
    with pytest.raises(SiteError, match="lies in the store"):
        refuse_inside(small.store.root / "smoke" / "x", small.store.root)
