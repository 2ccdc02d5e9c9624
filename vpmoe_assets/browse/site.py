"""The pages as files with relative links: for a paper's appendix, or a folder on a web server."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.files import replace_bytes, replace_text
from vpmoe_assets.browse.catalog import Catalog
from vpmoe_assets.browse.links import Links, page_of
from vpmoe_assets.browse.pages import STYLE, PageMissing, Pages, raw_names
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name

MARK = ".vpmoe-site"
"""A file in the directory that says who wrote it: another directory's files are nobody's to replace."""
_SMALL = 2_000_000
"""Bytes up to which a file of the store is put beside the pages."""
_TAKEN = (".json", ".jsonl", ".md", ".txt", ".png", ".toml")


class SiteError(Exception):
    """The site cannot be written there; the message says what to do."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        pages: How many pages.
        files: How many files of the store.
    """

    pages: int
    files: int


def chosen(catalog: Catalog, experiment: str, assets: Sequence[str]) -> list[Head]:
    """Return the artifacts of a site: the latest of the named assets, or of all, and all that they came from.

    Args:
        catalog: Of the store.
        experiment: Name.
        assets: Names; none takes every asset of the experiment.

    Raises:
        SiteError: One of them was never published.
    """
    view = catalog.view(experiment)
    latest = view.latest
    for asset in assets:
        if asset not in latest:
            there = ", ".join(latest) or "none"
            raise SiteError(f"{experiment}/{asset} is not in the store; there is: {there}")
    waiting = [latest[asset] for asset in (assets or latest)]
    found: dict[str, Head] = {}
    while waiting:
        head = waiting.pop()
        if version_name(head) not in found:
            found[version_name(head)] = head
            waiting += [there for _, there in view.parents(head) if there is not None]
    return list(found.values())


def write_site(
    pages: Pages, out: Path, heads: Sequence[Head], *, told: Callable[[str], None] | None = None
) -> Written:
    """Write the pages of some artifacts as files, in place of a site that was there before.

    Args:
        pages: That make them.
        out: The directory; made where there is none.
        heads: The artifacts.
        told: Called with each address.

    Raises:
        SiteError: Something else is in the directory.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise SiteError(f"{out} holds something else; choose a directory that is empty or not there")
    with pages.catalog.still():
        return _written(pages, out, heads, told)


def _written(pages: Pages, out: Path, heads: Sequence[Head], told: Callable[[str], None] | None) -> Written:
    there = frozenset(_addresses(pages.catalog, heads))
    raw = dict(_raw_files(pages, heads))
    for entry in list(out.iterdir()) if out.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / MARK, "written by `vpmoe site`, which replaces everything here\n", durable=False)
    replace_bytes(out / "style.css", STYLE.read_bytes(), durable=False)
    for address, source in raw.items():
        target = out / address
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            shutil.copyfile(source, target)
        else:
            target.write_bytes(source)
    for address in sorted(there):
        target = out / address / "index.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        links = Links(address, files=True, there=there, raw=raw.keys())
        target.write_text(pages.render(links), encoding="utf-8")
        if told is not None:
            told(address)
    return Written(len(there), len(raw))


def _addresses(catalog: Catalog, heads: Sequence[Head]) -> Iterator[str]:
    yield ""
    names = {version_name(head) for head in heads}
    for head in heads:
        yield f"{head.experiment}/"
        yield f"{head.experiment}/{head.asset}/"
        yield page_of(head)
        yield from (page_of(head, below) for below in ("lineage", "files", "record"))
        for old in catalog.view(head.experiment).assets[head.asset].heads:
            if old != head and version_name(old) in names:
                yield page_of(head, "diff", old.experiment, old.asset, old.version)


def _raw_files(pages: Pages, heads: Sequence[Head]) -> Iterator[tuple[str, Path | bytes]]:
    for head in heads:
        yield (
            f"{page_of(head, 'raw')}record.json",
            pages.raw(f"{page_of(head, 'raw')}record.json").content or b"",
        )
        record = pages.catalog.record(head)
        sizes = (
            {} if record is None else {entry.path: entry.size for entry in (*record.files, *record.run_files)}
        )
        for name in sorted(raw_names(record)) if record is not None else ():
            part, _, path = name.partition("/")
            if part in ("payload", "run") and path.endswith(_TAKEN) and sizes[path] <= _SMALL:
                address = page_of(head, "raw") + name
                try:
                    source = pages.raw(address).path
                except PageMissing:  # cleaned away since
                    continue
                if source is not None:
                    yield address, source


def refuse_inside(out: Path, root: Path) -> None:
    """Refuse to write into the store.

    Raises:
        SiteError: The directory lies in it.
    """
    place = Path(os.path.realpath(out))
    if place == root or root in place.parents:
        raise SiteError(f"{out} lies in the store {root}; choose a place outside it")
