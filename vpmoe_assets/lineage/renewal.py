"""Making an earlier version the latest one again, without making its bytes again."""

import os
import shutil

from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.record import MANIFEST_NAME, Draft, Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea


def make_latest(store: Store, work: WorkArea, record: Record) -> Record:
    """Return the latest version of an asset with the content and recipe of `record`.

    Whoever builds on an asset takes its latest version. After a recipe was changed and changed back, that is
    the one of the other recipe; so the version that is wanted again is published once more: the same files,
    linked and not copied, under a record that differs in version, sequence and time, and names the version it
    repeats in `details["repeats"]`.

    Args:
        store: Where it lies.
        work: The open work area of its fingerprint; what an interrupted attempt left there is discarded.
        record: Intact, of this work area's asset and fingerprint.

    Returns:
        `record` itself where it is the latest.
    """
    try:
        newest = store.latest(record.experiment, record.asset)
    except RecordError:  # a newer one is unreadable: nothing could be built on it
        newest = None
    if newest is not None and newest.version == record.version:
        return record
    work.clear()
    directory = store.directory(record)
    for source, target in ((directory / "payload", work.payload), (directory / "run", work.run)):
        shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)
    if record.manifest is not None:
        _link(str(directory / MANIFEST_NAME), str(work.manifest))
    fields = record.model_dump(include=set(Draft.model_fields))
    fields["details"] = {**fields["details"], "repeats": record.version}
    return store.publish(work, Draft.model_validate(fields))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
