"""What the pages say, whoever serves them."""

import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from safetensors.numpy import save

from tests.browse.conftest import HOSTILE
from tests.lineage.fabricate import publish
from vpmoe_assets.browse.links import Links, page_of
from vpmoe_assets.browse.pages import PageMissing, Pages
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.store import Store

VOID = {"meta", "link", "input", "br"}


class Shape(HTMLParser):
    """What elements are open, which there are, where they lead, and what is said."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> ends something else"


def shown(pages: Pages, address: str, **query: str) -> str:
    return pages.render(Links(address), query)


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def addresses(small) -> list[str]:
    runs = (small.first, small.second)
    below = [page_of(each, *rest) for each in (*runs, small.kd, small.ladder) for rest in ((), ("lineage",))]
    below += [page_of(small.second, "files"), page_of(small.second, "record"), page_of(small.kd, "record")]
    old = small.first
    return ["", "smoke/", "smoke/vpmoe_stage1/", *below,
            page_of(small.second, "diff", old.experiment, old.asset, old.version)]  # fmt: skip


def test_every_page_is_whole_html_without_scripts_handlers_or_inline_style(pages, small):
    for address in addresses(small):
        shape = Shape(shown(pages, address))
        assert not shape.open, address
        assert "script" not in shape.tags, address
        assert not {name for name in shape.attributes if name.startswith("on") or name == "style"}, address


def test_what_records_hold_is_escaped(pages, small):
    for address in (page_of(small.kd), page_of(small.kd, "record"), page_of(small.kd, "lineage")):
        page = shown(pages, address)
        assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown(pages, page_of(small.kd))


def test_the_overview_says_what_is_stale_and_why_and_shows_the_ladder(pages, small):
    said = text(shown(pages, "smoke/"))
    newer = small.store.latest("smoke", "synth")
    assert f"stale synth is now {newer.version}" in said
    assert "blocked check sha256: not the pin" in said
    assert "26,166,479" in said
    assert "+0.250 ± 0.010" in said
    assert f'href="../{page_of(small.second)}">vpmoe_stage1<' in shown(pages, "smoke/").replace(
        f' title="digest {small.second.digest}"', ""
    )


def test_an_artifacts_page_has_its_numbers_curves_checks_inputs_and_what_came_of_it(pages, small):
    page = shown(pages, page_of(small.second))
    said = text(page)
    for part in (
        "loss 1.5",
        "parameters 26,166,479",
        "synth_kd_v1 is stale",
        "Loss, nats",
        "vpmoe",
        "eval_vpmoe_stage1",
    ):
        assert part in said, part
    assert page.count("<polyline") == 2
    assert "no longer in the store" in said
    assert small.second.record_digest in said
    assert f"superseded {small.second.version} is newer" in text(shown(pages, page_of(small.first)))


def test_a_history_lists_versions_with_what_changed_between_them(pages, small):
    page = shown(pages, "smoke/vpmoe_stage1/")
    assert page.index(small.second.version) < page.index(f'">{small.first.version}<')
    links = [link for link in Shape(page).links if "/diff/" in link]
    assert links == [f"../../{page_of(small.second, 'diff', 'smoke', 'vpmoe_stage1', small.first.version)}"]


def test_a_comparison_names_the_value_that_differs_and_lays_the_curves_over_each_other(pages, small):
    page = shown(pages, page_of(small.second, "diff", "smoke", "vpmoe_stage1", small.first.version))
    assert "optimizer.lr 0.1 0.2" in text(page)
    assert "loss 1.75 1.5 -14.29 %" in text(page)
    assert "A: " + small.first.version in page
    same = shown(pages, page_of(small.first, "diff", "smoke", "vpmoe_stage1", small.first.version))
    assert "the same: equal content, recipe, code, packages and inputs" in same


def test_two_of_different_kinds_are_refused_with_the_remedy(pages, small):
    page = shown(pages, page_of(small.second, "diff", "smoke", "synth", small.synth.version))
    assert "They cannot be compared" in page
    assert "name two of one kind" in page


def test_the_contents_of_two_checkpoints_are_compared_when_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("vpmoe_assets.browse.differences._PATIENCE_S", 60.0)
    store = Store(tmp_path / "artifacts")
    first, second = (
        publish(store, "vpmoe", files={"model.safetensors": save({"w": array})})
        for array in (np.zeros(4, "f4"), np.array([0, 0, 3, 4], "f4"))
    )
    pages, address = Pages(store), page_of(second, "diff", "smoke", "vpmoe", first.version)
    assert 'href="?show=tensors#contents"' in shown(pages, address)
    assert "1 differ, 0 are the same; ‖B − A‖ is 5" in shown(pages, address, show="tensors")
    broken = publish(store, "vpmoe", files={"model.safetensors": b"no tensors"})
    refused = shown(pages, page_of(broken, "diff", "smoke", "vpmoe", first.version), show="tensors")
    assert 'class="warning"' in refused


def test_a_lineage_leads_up_to_the_source_behind_what_is_gone_and_down_to_the_report(pages, small):
    page = shown(pages, page_of(small.second, "lineage"))
    links = Shape(page).links
    for other in (small.synth, small.kd, small.ladder):
        assert any(link.endswith(page_of(other, "lineage")) for link in links), other.asset
    assert "vpmoe" in text(page)
    assert "gone" in page
    assert small.first.digest not in page, "a sibling is no relative"


def test_links_of_every_page_lead_to_pages_that_there_are(pages, small):
    for address in addresses(small):
        for link in Shape(shown(pages, address)).links:
            parts = [part for part in address.split("/") if part]
            while link.startswith("../"):
                parts, link = parts[:-1], link.removeprefix("../")
            link = re.split("[?#]", link)[0]
            target = unquote("/".join([*parts, link.removeprefix("./")]))
            if "/raw/" in target:
                pages.raw(target)
            elif target != "style.css":
                pages.render(Links(target))


@pytest.mark.parametrize(
    "address", ["nonesuch/", "smoke/nonesuch/", "smoke/synth/nonesuch/", "smoke/synth/x/y/z/"]
)
def test_what_is_not_there_is_said(pages, address):
    with pytest.raises(PageMissing, match="there is no"):
        pages.render(Links(address))


@pytest.mark.parametrize(
    "name",
    ["../../../synth", "payload/../.artifact.json", "payload/nonesuch", "/etc/passwd", "run", "", ".."],
)
def test_only_files_that_a_record_lists_are_given_away(pages, small, name):
    with pytest.raises(PageMissing, match="no record lists"):
        pages.raw(f"{page_of(small.second, 'raw')}{name}")


def test_a_link_that_someone_put_in_place_of_a_file_leads_nowhere(tmp_path):
    store = Store(tmp_path / "artifacts")
    record = publish(store, "synth", files={"data.txt": b"x"})
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = store.payload(record) / "data.txt"
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(PageMissing):
        Pages(store).raw(f"{page_of(record, 'raw')}payload/data.txt")


def test_pages_follow_what_is_published_removed_and_damaged(tmp_path):
    store = Store(tmp_path / "artifacts")
    pages = Pages(store)
    assert "Nothing has been published here yet" in shown(pages, "")
    first = publish(store, "synth")
    assert first.version in shown(pages, "smoke/")
    second = publish(store, "synth", files={"x": b"2"})
    assert second.version in shown(pages, "smoke/")
    (store.payload(second) / "x").unlink()
    assert "damaged payload/x missing" in text(shown(pages, "smoke/"))
    path = store.directory(first) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    assert "unreadable" in text(shown(pages, "smoke/synth/"))
    shutil.rmtree(store.directory(second))
    assert "unreadable" in text(shown(pages, "smoke/"))
    publish(store, "other")
    assert "other" in text(shown(pages, "smoke/"))


def test_many_files_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("vpmoe_assets.browse.pages.FILES_A_PAGE", 4)
    store = Store(tmp_path / "artifacts")
    record = publish(store, "synth", files={f"{n:04}": b"" for n in range(6)})
    first = shown(Pages(store), page_of(record, "files"))
    assert "page 1 of 2" in text(first)
    assert "payload/0003" in first
    assert "payload/0004" not in first
    assert "payload/0004" in shown(Pages(store), page_of(record, "files"), page="2")
    for odd in ("٣", "-1", "x", "9" * 50, ""):
        assert "page 1 of 2" in text(shown(Pages(store), page_of(record, "files"), page=odd))


def test_after_a_publication_only_its_asset_is_read_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "artifacts")
    kept = publish(store, "kept")
    made = publish(store, "made", (kept,))
    pages = Pages(store)
    monkeypatch.setattr("vpmoe_assets.browse.catalog._SETTLED_NS", 0)
    for address in ("", "smoke/", page_of(made), page_of(made, "lineage")):
        shown(pages, address)
    read = []
    scan = store.scan
    monkeypatch.setattr(store, "scan", lambda *names: read.append(names) or scan(*names))
    newer = publish(store, "made", (kept,))
    read.clear()  # publishing looks, too
    assert newer.version in shown(pages, "smoke/made/")
    assert newer.version in shown(pages, page_of(kept, "lineage"))
    assert read == [("smoke", "made")]


def test_what_was_made_from_an_artifact_and_is_gone_is_drawn_until_it_is_back(tmp_path):
    store = Store(tmp_path / "artifacts")
    first = publish(store, "first")
    made = publish(store, "made", (first,))
    last = publish(store, "last", (made,))
    pages = Pages(store)
    shutil.move(store.directory(made), tmp_path / "away")
    page = shown(pages, page_of(first, "lineage"))
    assert "lineage-gone" in page
    assert f"{page_of(last, 'lineage')}" in page, "the way goes on behind what is gone"
    assert page_of(made, "lineage") not in page, "nobody is led there"
    shutil.move(tmp_path / "away", store.directory(made))
    assert "lineage-gone" not in shown(pages, page_of(first, "lineage"))


def test_the_overview_begins_with_what_is_out_of_date_by_itself(tmp_path):
    store = Store(tmp_path / "artifacts")
    first = publish(store, "first")
    last = publish(store, "last", (publish(store, "second", (first,)),))
    publish(store, "first", files={"x": b"new"})
    said = text(shown(Pages(store), "smoke/"))
    assert "Needs a look stale second first is now" in said
    assert "1 more is out of date because of it" in said
    assert last.asset not in said.partition("Needs a look")[2].partition("1 more")[0]


def test_a_name_that_is_not_there_leads_to_the_nearest(pages):
    with pytest.raises(PageMissing, match="no smoke/synht in the store; the nearest name is synth"):
        pages.render(Links("smoke/synht/"))
