"""Cleaning up: what nothing that is kept was made from, and what a finished training no longer needs.

Kept are the pinned versions, the latest ones of each asset, and everything that they were made from. Records
stay, whatever goes: a version whose files were removed can be shown, compared, and made again. A statement
`collected` comes first, then one rename takes a directory out of sight, then it is removed; whoever is killed
on the way leaves a store that verifies, and the next clean-up takes what was left.
"""

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.contract.files import present, remove_tree
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.attestation import signature_objects, signed
from vpmoe_assets.lineage.collected import CONTENT, OBJECTS, RESUME, collected_areas, pinned
from vpmoe_assets.lineage.errors import BusyError, CollectingError, RecordError
from vpmoe_assets.lineage.graph import ancestors
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import Layout, version_name
from vpmoe_assets.lineage.ledger import DIRECTORY as LEDGER
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store

Sort = Literal["resume", "payloads", "work", "objects"]
SORTS: tuple[Sort, ...] = get_args(Sort)
MEANING = {
    "resume": "resume checkpoints of finished trainings, pinned ones apart",
    "payloads": "files of versions from which nothing that is kept was made",
    "work": "what killed and failed runs left to go on from",
    "objects": "snapshots and lists that only such versions, or none, name",
}

_TRASH = ".collected"
_YOUNG_S = 3600.0
"""An object that was put a moment ago may be about to be named."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that could go.

    Attributes:
        sort: Of what sort it is.
        what: `experiment/asset/version`, or a path in the store.
        paths: That would be removed, absolute.
        areas: For the statement: paths in the version; none where there is no version to speak of.
        size: Bytes, files with several names once.
        why: It could go.
    """

    sort: Sort
    what: str
    paths: tuple[Path, ...]
    areas: tuple[str, ...]
    size: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What could go, and what is kept.

    Attributes:
        items: By sort.
        kept: Versions that are kept, each with why: `pinned`, `latest`, or what was made from it.
        skipped: What is left alone although it could go, and why.
        heads: Every version, by name.
    """

    items: tuple[Item, ...]
    kept: dict[str, str]
    skipped: tuple[str, ...]
    heads: dict[str, Head]

    def size(self, sorts: Iterable[Sort] = SORTS) -> int:
        """Return the bytes of some sorts, files with several names counted once."""
        return sum(_inodes(self._paths(sorts))[0].values())

    def freed(self, sorts: Iterable[Sort] = SORTS) -> int:
        """Return the bytes of which no name would be left anywhere if those sorts went."""
        sizes, names, links = _inodes(self._paths(sorts))
        return sum(size for inode, size in sizes.items() if names[inode] >= links[inode])

    def _paths(self, sorts: Iterable[Sort]) -> list[Path]:
        return [path for item in self.items if item.sort in sorts for path in item.paths]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "sorts": {
                sort: {
                    "meaning": MEANING[sort],
                    "items": [
                        {"what": item.what, "bytes": item.size, "why": item.why}
                        for item in self.items
                        if item.sort == sort
                    ],
                    "bytes": self.size([sort]),
                    "freed": self.freed([sort]),
                }
                for sort in SORTS
            },
            "freed": self.freed(),
            "kept": self.kept,
            "skipped": list(self.skipped),
        }


def plan(store: Store, *, latest: int = 1, at_work: Callable[[Path], bool] = lambda area: False) -> Plan:
    """Find what could go; changes nothing.

    Args:
        store: To be cleaned up.
        latest: How many of the newest versions of each asset are kept.
        at_work: Says of a work area whether a job is on record there.

    Raises:
        CollectingError: A record cannot be read, so that nobody knows what was made from what.
        StatementError: What was said about a version was altered.
    """
    if damaged := next(store.damaged(), None):
        raise CollectingError(
            f"{version_name(damaged)} has a record that cannot be read, so nobody knows what it was made "
            "from, and nothing is cleaned up: materialise it again, or remove it and say so by `vpmoe forget`"
        )
    heads = {head.record_digest: head for head in store.heads()}
    pins, gone = {}, {}
    for digest, head in heads.items():
        said = store.statements.about_digest(head.experiment, head.asset, digest)
        gone[digest] = collected_areas(said)
        if (pin := pinned(said)) is not None:
            pins[digest] = pin
    kept = _kept(store, heads, pins, latest)
    layout = Layout(store.root)
    items: list[Item] = []
    skipped: list[str] = []
    for digest, head in heads.items():
        place, name = layout.directory(head), version_name(head)
        if digest not in kept:
            paths = tuple(place / area for area in CONTENT if os.path.lexists(place / area))
            if paths:
                items.append(_item("payloads", name, paths, CONTENT, "nothing that is kept was made from it"))
        elif digest not in pins and _holds_files(place / RESUME):
            why = "the training is finished; its weights are in the payload"
            items.append(_item("resume", name, (place / RESUME,), (RESUME,), why))
    for path in _work_areas(layout):
        if at_work(path):
            skipped.append(f"{path.relative_to(store.root)}: a job is on record there; see `vpmoe reap`")
        else:
            items.append(
                _item("work", str(path.relative_to(store.root)), (path,), (), "no run is at work there")
            )
    if torn := tuple(_half_written(layout)):
        items.append(_item("work", "half-written files", torn, (), "who wrote them was killed"))
    items += _objects(store, heads, kept, gone)
    names = {version_name(heads[digest]): why for digest, why in kept.items()}
    return Plan(tuple(items), names, tuple(skipped), {version_name(head): head for head in heads.values()})


def collect(
    store: Store,
    sorts: Sequence[Sort],
    *,
    latest: int = 1,
    at_work: Callable[[Path], bool] = lambda area: False,
    reason: str = "",
) -> Plan:
    """Remove what could go of some sorts.

    Nobody can begin to make anything meanwhile, and nothing is removed while somebody is at it.

    Args:
        store: To be cleaned up.
        sorts: What is to go.
        latest: As in `plan`.
        at_work: As in `plan`.
        reason: In a person's words.

    Returns:
        What there was; all of it of these sorts is gone.

    Raises:
        BusyError: A run is at work in this store, or another clean-up.
        CollectingError: As in `plan`.
    """
    layout = Layout(store.root)
    with locks.hold(layout.collecting, "a clean-up of the store", 0):
        for lock in sorted(layout.work.glob("*/.locks/*.lock")):
            if locks.held(lock):
                raise BusyError(
                    f"a run is at work in {store.root} ({lock.stem}: {locks.holder(lock)}); wait for it, or "
                    "end it"
                )
        found = plan(store, latest=latest, at_work=at_work)
        for item in found.items:
            if item.sort in sorts:
                _state(store, found, item, reason)
                for path in item.paths:
                    _remove(layout, path)
        _empty(layout.work / _TRASH)
    return found


def _kept(store: Store, heads: dict[str, Head], pins: dict[str, Statement], latest: int) -> dict[str, str]:
    """Return the records that are kept, by digest, with why."""
    kept: dict[str, str] = {}
    roots: list[tuple[Head, str]] = [(heads[digest], "pinned") for digest in pins]
    for experiment in store.experiments():
        for asset in store.assets(experiment):
            newest = store.scan(experiment, asset)[0][-latest:]
            roots += [(head, "latest") for head in reversed(newest)]
    for head, why in roots:
        if kept.get(head.record_digest) in ("pinned", "latest"):
            continue
        kept[head.record_digest] = why
        for digest in ancestors(store, head).nodes:
            if digest in heads:
                kept.setdefault(digest, f"{version_name(head)} was made from it")
    return kept


def _work_areas(layout: Layout) -> Iterator[Path]:
    if not layout.work.is_dir():
        return
    if (trash := layout.work / _TRASH).is_dir() and any(trash.iterdir()):
        yield trash
    for locks_of in sorted(layout.work.glob("*/.locks/")):
        if locks_of.parent.name[0] != ".":
            areas = (path for path in locks_of.parent.iterdir() if path.is_dir() and path != locks_of)
            yield from sorted(areas)


def _half_written(layout: Layout) -> Iterator[Path]:
    """Yield what is left of small files whose writer was killed, or had no room, before they had a name."""
    places = [layout.root / LEDGER, layout.work / ".runs", layout.work / ".sources"]
    found = [path for place in places for path in _hidden(place)]
    found += [path for path in layout.work.glob(".*.tmp") if path.is_file()]
    yield from sorted(_old(found, layout))


def _hidden(place: Path) -> Iterator[Path]:
    """Yield what in a directory has the name of something unfinished."""
    for directory, directories, files in os.walk(place):
        hidden = [name for name in (*directories, *files) if name[0] == "."]
        if place.name == ".sources":
            directories.clear()
        yield from (Path(directory, name) for name in hidden)


def _objects(
    store: Store,
    heads: dict[str, Head],
    kept: dict[str, str],
    gone: dict[str, frozenset[str]],
) -> Iterator[Item]:
    """Yield the objects that only versions name which are, or could be, collected, and what none names."""
    directory = store.root / OBJECTS
    if not directory.is_dir():
        return
    needed = _signed_objects(store)
    named: dict[str, list[Head]] = {}
    for digest, head in heads.items():
        with contextlib.suppress(FileNotFoundError, RecordError):
            roles = store.record(head).objects.model_dump(exclude_none=True)
            if digest in kept and "payload" not in gone[digest]:
                needed |= set(roles.values())
            for sha256 in roles.values():
                named.setdefault(sha256, []).append(head)
    loose: list[Path] = []
    by_version: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        if path.name in needed or not path.is_file():
            continue
        if path.name in named:
            by_version.setdefault(version_name(named[path.name][0]), []).append(path)
        else:
            loose.append(path)
    loose = list(_old(loose, Layout(store.root)))
    for name, paths in by_version.items():
        why = "named by versions alone that are, or could be, cleaned away: they cannot be made again then"
        yield _item("objects", name, tuple(paths), (OBJECTS,), why)
    if loose:
        yield _item("objects", OBJECTS, tuple(loose), (), "no record in the store names it")


def _old(paths: Sequence[Path], layout: Layout) -> Iterator[Path]:
    """Yield what nobody has written for a while, by the clock of those files."""
    if paths:
        try:
            now = present(layout.work)
        except OSError:  # it may only be looked at
            now = time.time()
        yield from (path for path in paths if now - path.lstat().st_mtime > _YOUNG_S)


def _signed_objects(store: Store) -> set[str]:
    """Return the bundles and keys that signatures name: small, and kept like the statements themselves."""
    said = (
        statement
        for experiment in store.experiments()
        for asset in store.statements.assets(experiment)
        for each in store.statements.of_asset(experiment, asset, "signed").values()
        for statement in signed(each)
    )
    return {sha256 for statement in said for sha256 in signature_objects(statement).values()}


def _state(store: Store, found: Plan, item: Item, reason: str) -> None:
    """Say of each version concerned what goes, before it does."""
    concerned = [found.heads[item.what]] if item.what in found.heads else []
    if item.sort == "objects" and concerned:
        concerned = [head for head in found.heads.values() if _names(store, head, item.paths)]
    for head in concerned:
        said = store.statements.about_digest(head.experiment, head.asset, head.record_digest)
        if not set(item.areas) <= collected_areas(said):
            body = {"areas": list(item.areas), "sort": item.sort, "bytes": item.size}
            record = store.record(head)
            store.statements.append(Statement.about(record, "collected", body, reason=reason or item.why))


def _names(store: Store, head: Head, paths: Iterable[Path]) -> bool:
    named = set(store.record(head).objects.model_dump(exclude_none=True).values())
    return any(path.name in named for path in paths)


def _remove(layout: Layout, path: Path) -> None:
    """Take a file or directory out of sight with one rename, and remove it then."""
    trash = layout.work / _TRASH
    if path == trash:
        return
    trash.mkdir(parents=True, exist_ok=True)
    hidden = trash / secrets.token_hex(8)
    path.rename(hidden)
    if hidden.is_dir() and not hidden.is_symlink():
        remove_tree(hidden)
    else:
        hidden.unlink()


def _empty(trash: Path) -> None:
    if trash.is_dir():
        remove_tree(trash)


def _item(sort: Sort, what: str, paths: tuple[Path, ...], areas: tuple[str, ...], why: str) -> Item:
    return Item(sort, what, paths, areas, sum(_inodes(paths)[0].values()), why)


def _holds_files(path: Path) -> bool:
    return path.is_file() or any(names for _, _, names in os.walk(path))


def _inodes(
    paths: Iterable[Path],
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Return of every file below some paths, by its inode: size, names found, and names it has."""
    sizes: dict[tuple[int, int], int] = {}
    names: dict[tuple[int, int], int] = {}
    links: dict[tuple[int, int], int] = {}
    for path in paths:
        files = (
            [path] if path.is_file() else (Path(top, name) for top, _, its in os.walk(path) for name in its)
        )
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                status = file.lstat()
                if stat.S_ISREG(status.st_mode):
                    inode = (status.st_dev, status.st_ino)
                    sizes[inode], links[inode] = status.st_size, status.st_nlink
                    names[inode] = names.get(inode, 0) + 1
    return sizes, names, links
