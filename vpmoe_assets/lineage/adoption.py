"""A run or data set made by hand comes into the store, as what it is: adopted.

Its record says by whom, when, from where, and what each file holds. It claims no recipe, no inputs and no
code: its fingerprint is over the content alone, so that nothing that is made here ever has it, and lineage
begins with it. Commit and machine in the record are those of the program that took it in.
"""

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from trainer.contract.canonical import sha256_json
from trainer.contract.safetensors_header import read_header
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root
from vpmoe_assets.lineage.errors import AdoptionError, RecordError
from vpmoe_assets.lineage.filememory import identity
from vpmoe_assets.lineage.foreign_files import Foreign, ForeignFile
from vpmoe_assets.lineage.record import CodeState, Draft, Record, utc_now
from vpmoe_assets.lineage.statements import Statement, this_user
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea

SCHEMA: Final = "vpmoe.adopted/1"
"""Of the fingerprint of what was adopted."""


@dataclass(frozen=True)
class Surroundings:
    """What the program that adopts says of itself.

    Attributes:
        code: Its commit.
        environment: The machine, as in any record.
        command: Command line.
        blocking_checks: That have to pass before anything is built on the artifact.
    """

    code: CodeState
    environment: Mapping[str, Any]
    command: Sequence[str]
    blocking_checks: Sequence[str]


def is_adopted(record: Record) -> bool:
    """Whether an artifact was made elsewhere and adopted."""
    return record.fingerprint_payload.get("schema") == SCHEMA


def origin(record: Record) -> str:
    """Say where what was adopted came from: by whom, when, from which place."""
    told = record.details["adopted"]
    trusted = f", pickles trusted: {', '.join(told['trusted'])}" if told["trusted"] else ""
    return f"adopted by {told['by']} on {record.published_utc[:10]} from {told['from']}{trusted}"


def require_adoptable(
    store: Store, experiment: str, asset: str, found: Foreign, *, trust: bool, replace: bool
) -> None:
    """Refuse pickles nobody trusts, and to stand before what was made here.

    Raises:
        AdoptionError: Says which, and what to do.
    """
    if found.pickles and not trust:
        raise AdoptionError(
            f"{found.pickles[0]} is a pickle, which runs code when it is opened: write it as safetensors, or "
            "say --trust where you know who made it"
        )
    if replace:
        return
    try:
        head = store.latest(experiment, asset)
        latest = None if head is None else store.record(head)
    except RecordError as error:
        raise AdoptionError(f"{error}, or say --replace") from error
    if latest is not None and not is_adopted(latest):
        raise AdoptionError(
            f"{experiment}/{asset}@{latest.version} was made here; say --replace for the adopted version to "
            "stand before it (it stays, and can be named)"
        )


def adopt(
    store: Store,
    experiment: str,
    asset: str,
    directory: Path,
    found: Foreign,
    about: Surroundings,
    *,
    reason: str,
) -> tuple[Record, bool]:
    """Copy files into the store as the newest version of an asset, and say so.

    A kill leaves nothing but a work area, which the next attempt begins anew.

    Args:
        store: Where to.
        experiment: Name.
        asset: Name.
        directory: Where they are.
        found: As looked at.
        about: Who takes them in.
        reason: A person's; may be empty.

    Returns:
        The record, and whether it is new: the same content is adopted once.

    Raises:
        AdoptionError: A file was changed while it was copied; nothing is published.
    """
    entries = [FileEntry(each.path, each.known_by[2], each.sha256) for each in found.payload]
    payload = {"schema": SCHEMA, "content": merkle_root(entries), "inputs": {}}
    fingerprint, started = sha256_json(payload), utc_now()
    with store.work_area(experiment, asset, fingerprint) as work:
        head = store.latest(experiment, asset)
        if head is not None and head.fingerprint == fingerprint:
            latest = store.record(head)
            if store.intact(latest):
                return latest, False
        work.clear()
        try:
            _copy(work, found)
            record = store.publish(
                work,
                Draft(
                    fingerprint_payload=payload,
                    code=about.code,
                    environment=dict(about.environment),
                    command=tuple(about.command),
                    started_utc=started,
                    finished_utc=utc_now(),
                    metrics=_numbers(found),
                    blocking_checks=tuple(about.blocking_checks),
                    details={
                        "adopted": {
                            "by": this_user(),
                            "from": f"{socket.gethostname()}:{os.path.realpath(directory)}",
                            "reason": reason,
                            "trusted": found.pickles,
                            "left": list(found.left),
                        }
                    },
                ),
            )
        except BaseException:
            if work.open and work.path.exists():
                work.clear()
            raise
    body = {"from": record.details["adopted"]["from"], "trusted": found.pickles}
    if not any(each.kind == "adopted" for each in store.statements.about(record)):
        store.statements.append(Statement.about(record, "adopted", body, reason=reason))
    return record, True


def _copy(work: WorkArea, found: Foreign) -> None:
    for each in found.payload:
        _copy_file(each, work.payload / each.path)
    for each in found.run:
        _copy_file(each, work.run / each.path)
    if found.manifest is not None:
        _copy_file(found.manifest, work.manifest)


def _copy_file(file: ForeignFile, target: Path) -> None:
    """Copy one file, and make sure that it is the one that was looked at."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as source, target.open("xb") as copy:
        before = identity(os.fstat(descriptor))
        shutil.copyfileobj(source, copy, 1 << 20)
        same = before == file.known_by == identity(os.fstat(descriptor))
    if not same or (file.sha256 and file_sha256(target) != file.sha256):
        raise AdoptionError(f"{file.source} was changed meanwhile; adopt it when nobody writes to it")


def _numbers(found: Foreign) -> dict[str, int]:
    """Return what the files say of themselves: the number of parameters."""
    headers = [read_header(each.source) for each in found.payload if each.path.endswith(".safetensors")]
    if not headers:
        return {}
    entries = [entry for header in headers for entry in header.entries.values()]
    return {"parameters": sum(prod(entry.shape) for entry in entries), "tensors": len(entries)}
