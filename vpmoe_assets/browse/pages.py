"""The pages: an address in, HTML out. Whether a server asks or a directory is written makes no difference."""

import difflib
import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vpmoe_assets.browse import artifact, differences
from vpmoe_assets.browse.catalog import Asset, Catalog, View
from vpmoe_assets.browse.comparison import ByInputs, Compared, Comparison
from vpmoe_assets.browse.links import AT_WORK, Links, at_work, page_of
from vpmoe_assets.browse.panels import training_charts
from vpmoe_assets.browse.picture import lineage_picture
from vpmoe_assets.browse.state import State, state_of
from vpmoe_assets.browse.tree import tree
from vpmoe_assets.lineage.changes import Changes
from vpmoe_assets.lineage.comparison import compare
from vpmoe_assets.lineage.digest import FileEntry
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.graph import both_ways
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import Versioned
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record, record_bytes
from vpmoe_assets.lineage.staleness import ABOVE, Standing
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.at_work import jobs, publishing
from vpmoe_assets.units import human_bytes

HERE = Path(__file__).parent
STYLE = HERE / "style.css"
FILES_A_PAGE = 1000
_FILES_SHOWN = 12
_VERSIONS_A_PAGE = 100
MOST = 80
"""Nodes of a picture; what is further away is left to the pages of its own."""


class PageMissing(Exception):  # noqa: N818 (an answer, not a fault)
    """There is no such page; the message says what there is instead."""


@dataclass(frozen=True)
class Raw:
    """A file as it lies in the store, or the bytes of a record."""

    name: str
    path: Path | None = None
    content: bytes | None = None


class Pages:
    """All pages over one store.

    Args:
        store: The store.
        compare: Asked where the assets of an experiment stand; by default only newer inputs count.
    """

    def __init__(self, store: Store, compare: Comparison | ByInputs | None = None) -> None:
        self.store = store
        self.catalog = Catalog(store)
        self._compare = compare or ByInputs(store)
        self._compared: dict[str, tuple[View, Hashable, Compared]] = {}
        self._contents = differences.OnDemand(store)

    def render(self, links: Links, query: Mapping[str, str] | None = None) -> str:
        """Return the page at an address.

        Args:
            links: From that page.
            query: What the address is followed by.

        Raises:
            PageMissing: There is none.
        """
        query = query or {}
        match [part for part in links.page.split("/") if part]:
            case []:
                return self._store(links)
            case [experiment]:
                return self._experiment(links, experiment)
            case [experiment, asset]:
                return self._history(links, experiment, asset, query)
            case [experiment, asset, word] if word == AT_WORK:
                return self._at_work(links, experiment, asset)
            case [experiment, asset, version, *below]:
                head, record = self._record(experiment, asset, version)
                match below:
                    case []:
                        return self._artifact(links, head, record)
                    case ["lineage"]:
                        return self._lineage(links, head)
                    case ["files"]:
                        return self._files(links, head, record, query)
                    case ["record"]:
                        return self._template("record.html", links, head=head, record=_tree_of(record))
                    case ["diff", *other] if len(other) == 3:
                        return self._diff(links, self._record(*other)[1], record, query)
        raise PageMissing("there is no such page")

    def raw(self, address: str) -> Raw:
        """Return a file that a record lists, at `<experiment>/<asset>/<version>/raw/…`.

        Raises:
            PageMissing: No record lists it, or it is not there.
        """
        match address.split("/", 4):
            case [experiment, asset, version, "raw", name]:
                head, record = self._record(experiment, asset, version)
                if name == "record.json":
                    return Raw(name, content=record_bytes(record))
                if name in raw_names(record):
                    directory = self.store.directory(head).resolve()
                    path = (directory / name).resolve()
                    # Published trees hold no links that lead out, but someone may have put one there since.
                    if path.is_relative_to(directory) and path.is_file():
                        return Raw(path.name, path=path)
        raise PageMissing("no record lists such a file, or it is no longer there")

    def missing(self, links: Links, said: str) -> str:
        """Return the page that says that there is none."""
        return self._template("missing.html", links, said=said)

    def warm(self, experiment: str) -> None:
        """Find out what the pages of an experiment need, so that the first reader need not wait for it."""
        for name in self._templates.list_templates(".html"):
            self._templates.get_template(name)
        if (view := self.catalog.view(experiment)).assets:
            compared = self._standings(view, experiment)
            for asset in compared.found:
                compared.causes(asset)
        for name in self.store.experiments():
            self.catalog.whole_view(name)

    # One method a page.

    def _store(self, links: Links) -> str:
        rows = []
        for name, view in self.catalog.experiments().items():
            newest = max(view.latest.values(), key=lambda head: head.published_utc, default=None)
            versions = sum(len(asset.heads) for asset in view.assets.values())
            size = sum(asset.heads.own_size for asset in view.assets.values())
            rows.append((name, len(view.assets), versions, size, newest))
        return self._template("store.html", links, rows=rows, root=self.store.root)

    def _experiment(self, links: Links, experiment: str) -> str:
        view = self._view(experiment)
        compared = self._standings(view, experiment)
        assets = view.assets
        records = {
            name: self.catalog.record(asset.latest)
            for name, asset in assets.items()
            if asset.latest is not None
        }
        rows = [
            (asset, self._state(view, asset, records.get(name), compared.found.get(name)))
            for name, asset in _by_use(assets)
        ]
        counts: dict[str, int] = {}
        for _, state in rows:
            counts[state.word] = counts.get(state.word, 0) + 1
        report = view.latest.get("ladder_report")
        ladder = None if report is None else artifact.ladder_of(self.store.payload(report))
        running = jobs(self.store.root, experiment)
        wrong = [row for row in rows if row[1].word != "fresh"]
        first = [row for row in wrong if not _follows(compared.found.get(row[0].name))]
        return self._template(
            "experiment.html",
            links,
            first=first,
            following=len(wrong) - len(first),
            experiment=experiment,
            rows=rows,
            counts=counts,
            note=compared.note,
            busy=compared.busy,
            missing=[name for name, at in compared.found.items() if at.state == "missing"],
            ladder=ladder,
            report=report,
            evaluated=self._evaluated(view, report),
            jobs=running,
            moving=not links.files and any(job.moving for job in running),
        )

    def _at_work(self, links: Links, experiment: str, asset: str) -> str:
        """Return the page of an asset's jobs that have not been published: their curves so far."""
        view = self._view(experiment)
        running = [job for job in jobs(self.store.root, experiment) if job.asset == asset]
        latest = view.latest.get(asset)
        ending = not running and publishing(self.store.root, experiment, asset)
        if not running and not ending and latest is None:
            raise PageMissing(f"nothing is at work on {experiment}/{asset}, and there is no version of it")
        return self._template(
            "at_work.html",
            links,
            experiment=experiment,
            asset=asset,
            jobs=[(job, training_charts(artifact.lines_of(job.metrics))) for job in running],
            ending=ending,
            moving=ending or any(job.moving for job in running),
            latest=latest,
        )

    def _history(self, links: Links, experiment: str, name: str, query: Mapping[str, str]) -> str:
        view = self._view(experiment)
        asset = self._asset(view, experiment, name)
        newest = list(reversed(asset.heads))
        page, pages, shown = _paged(newest, _VERSIONS_A_PAGE, query, whole=links.files)
        names = [
            name
            for name in artifact.FIRST
            if any(isinstance(head.metrics.get(name), int | float) for head in asset.heads)
        ][:5]
        before = {
            head.version: previous for head, previous in zip(asset.heads[1:], asset.heads[:-1], strict=False)
        }
        latest = None if asset.latest is None else self.catalog.record(asset.latest)
        standing = self._standings(view, asset.experiment).found.get(asset.name)
        return self._template(
            "history.html",
            links,
            asset=asset,
            names=names,
            heads=shown,
            before=before,
            state=self._state(view, asset, latest, standing),
            page=page,
            pages=pages,
        )

    def _artifact(self, links: Links, head: Head, record: Record) -> str:
        view = self.catalog.view(head.experiment)
        directory = self.store.directory(head)
        ladder = artifact.ladder_of(directory / "payload")
        compared = self._standings(view, head.experiment) if view.is_latest(head) else Compared({})
        others = [each for each in reversed(view.assets[head.asset].heads) if each != head]
        return self._template(
            "artifact.html",
            links,
            head=head,
            record=record,
            directory=directory,
            state=state_of(self.store, view, record, compared.found.get(head.asset)),
            causes=compared.causes(head.asset),
            note=compared.note,
            busy=compared.busy,
            facts=artifact.facts(record),
            numbers=artifact.numbers(record),
            cards=artifact.cards(record),
            charts=artifact.charts(record, directory) if ladder is None else ladder.charts(),
            ladder=ladder,
            report=head,
            evaluated=self._evaluated(view, head if ladder else None),
            parents=view.parents(head),
            children=view.children(head),
            evaluations=record.evals,
            files=record.files[:_FILES_SHOWN],
            others=others[:8],
            **artifact.judged(self.store, record, self.catalog.remarks),
        )

    def _lineage(self, links: Links, head: Head) -> str:
        view = self.catalog.whole_view(head.experiment)
        graph = both_ways(self.store, head, known=view.records)
        return self._template(
            "lineage.html",
            links,
            head=head,
            above=graph.above,
            below=graph.below,
            left_out=max(0, len(graph.nodes) - MOST),
            image=lineage_picture(self.catalog.remarks, view, graph.nearest(MOST), links),
            parents=view.parents(head),
            children=view.children(head),
        )

    def _files(self, links: Links, head: Head, record: Record, query: Mapping[str, str]) -> str:
        entries: list[tuple[str, FileEntry]] = [("payload", entry) for entry in record.files]
        entries += [("run", entry) for entry in record.run_files]
        page, pages, shown = _paged(entries, FILES_A_PAGE, query, whole=links.files)
        return self._template(
            "files.html", links, head=head, record=record, entries=shown, page=page, pages=pages
        )

    def _diff(self, links: Links, old: Record, new: Record, query: Mapping[str, str]) -> str:
        try:
            found = compare(self.store, old, new)
        except ComparisonError as error:
            return self._template("diff.html", links, old=old, new=new, refused=str(error), busy=False)
        shown = query.get("show", "")
        what = differences.CONTENTS.get(found.kind, "")
        contents = differences.Contents()
        if shown == what and what:
            contents = self._contents.of(what, old, new)
        code = []
        if shown == "code" or links.files:  # of files nothing more can be asked
            code = differences.code_lines(self.store, old, new, found)
        return self._template(
            "diff.html",
            links,
            old=old,
            new=new,
            refused="",
            found=found,
            code=code,
            what=what,
            contents=contents,
            busy=contents.busy,
            charts=differences.overlaid(self.store, old, new),
        )

    # What they share.

    def _evaluated(self, view: View, report: Head | None) -> dict[str, Head]:
        """Return the versions of the checkpoints that a ladder's page was drawn of, by asset."""
        found: dict[str, Head] = {}
        if report is None:
            return found
        for reference, evaluation in view.parents(report):
            checkpoint = reference.asset.removeprefix("eval_")
            for measured, head in view.parents(evaluation) if evaluation is not None else ():
                if measured.asset == checkpoint and head is not None:
                    found[checkpoint] = head
        return found

    def _state(self, view: View, asset: Asset, record: Record | None, standing: Standing | None) -> State:
        if asset.damaged and (asset.latest is None or record is None):
            return State("unreadable", str(asset.damaged[0].error))
        if record is None:
            return State("unreadable", "its record is gone or altered")
        return state_of(self.store, view, record, standing)

    def _standings(self, view: View, experiment: str) -> Compared:
        """Return where every asset of an experiment stands, found anew where something has changed."""
        known = self._compared.get(experiment)
        if self.catalog.is_still and known is not None and known[0].assets is view.assets:
            return known[2]
        state = (_changed(self.store.root), self._compare.state(experiment))
        if known is None or known[0].assets is not view.assets or known[1] != state:
            compared = self._compare.of(self.catalog.latest(experiment))
            known = self._compared[experiment] = view, state, compared
        return known[2]

    def _view(self, experiment: str) -> View:
        view = View({})
        if self.catalog.is_still or experiment in self.store.experiments():
            view = self.catalog.view(experiment)
        if not view.assets:
            there = ", ".join(self.catalog.experiments()) or "none"
            raise PageMissing(f"there is no experiment {experiment!r} in the store; there is: {there}")
        return view

    def _asset(self, view: View, experiment: str, asset: str) -> Asset:
        found = view.assets.get(asset)
        if found is None:
            raise PageMissing(_unknown(f"{experiment}/{asset}", asset, view.assets, f"{experiment} has"))
        return found

    def _record(self, experiment: str, asset: str, version: str) -> tuple[Head, Record]:
        found = self._asset(self._view(experiment), experiment, asset)
        head = found.by_version.get(version)
        record = None if head is None else self.catalog.record(head)
        if head is None or record is None:
            newest = "" if found.latest is None else f"; its latest version is {found.latest.version}"
            raise PageMissing(
                f"there is no readable version {version} of {experiment}/{asset} in the store{newest}"
            )
        return head, record

    def _template(self, name: str, links: Links, **values: Any) -> str:
        return self._templates.get_template(name).render(links=links, **values)

    @cached_property
    def _templates(self) -> Any:
        from vpmoe_assets.browse.compiled import environment

        filters = {
            "bytes": human_bytes,
            "number": artifact.said,
            "when": lambda text: text[:16].replace("T", " "),
            "took": artifact.took,
            "tree": tree,
        }
        return environment(filters, {"page_of": page_of, "at_work": at_work, "raw": _raw})


def _follows(standing: Standing | None) -> bool:
    """Whether an asset is out of date only because inputs are: it is looked at by looking at them."""
    return standing is not None and bool(standing.causes) and all(c.kind in ABOVE for c in standing.causes)


def _unknown(name: str, asked: str, there: Iterable[str], whose: str) -> str:
    """Say that something is not in the store, and what is nearest, or what there is."""
    near = difflib.get_close_matches(asked, list(there), 1)
    return f"there is no {name} in the store; " + (
        f"the nearest name is {near[0]}" if near else f"{whose}: {', '.join(there)}"
    )


def _changed(root: Path) -> int | None:
    """Return when somebody last noted, or settled, a change of what the store says of a version."""
    try:
        return os.stat(Changes(root).directory).st_mtime_ns
    except FileNotFoundError:
        return None


def raw_names(record: Record) -> set[str]:
    """Return the files of a version that its page links to, relative to its directory."""
    names = {f"payload/{entry.path}" for entry in record.files}
    names |= {f"run/{entry.path}" for entry in record.run_files}
    return names | ({MANIFEST_NAME} if record.manifest is not None else set()) | {RECORD_NAME}


def _raw(named: Versioned, *below: str) -> str:
    return page_of(named, "raw", *below).rstrip("/")


def _by_use(assets: Mapping[str, Asset]) -> Iterable[tuple[str, Asset]]:
    """Return assets in the order in which their latest versions were made from each other."""
    return sorted(
        assets.items(),
        key=lambda item: item[1].latest.published_utc if item[1].latest is not None else "",
    )


def _paged(
    entries: Sequence[Any], size: int, query: Mapping[str, str], *, whole: bool
) -> tuple[int, int, Sequence[Any]]:
    """Return the number of the page, how many there are, and what is on it."""
    pages = 1 if whole else max(1, -(-len(entries) // size))
    given = query.get("page", "1")
    page = min(pages, max(1, int(given))) if given.isascii() and given.isdecimal() and len(given) < 9 else 1
    return page, pages, entries if whole else entries[(page - 1) * size : page * size]


def _tree_of(record: Record) -> dict[str, Any]:
    """Return a record for the readable tree, with its long lists of files at the end."""
    fields = record.to_dict() | {"record_digest": record.record_digest}
    last = ("fingerprint_payload", "environment", "files", "run_files")
    ordered = {name: fields[name] for name in sorted(fields) if name not in last}
    plain: dict[str, Any] = json.loads(json.dumps(ordered | {name: fields[name] for name in last}))
    return plain
