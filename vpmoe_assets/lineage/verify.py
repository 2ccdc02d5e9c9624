"""Is every file still what it was? Compare a published artifact, and all it came from, with the records."""

from pathlib import Path

from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.integrity import Problem, payload_problems, run_problems, version_name
from vpmoe_assets.lineage.record import RECORD_NAME, Record, read_record
from vpmoe_assets.lineage.store import Store


def verify_record(
    store: Store, record: Record, deep: bool = True, seen: set[str] | None = None
) -> list[Problem]:
    """Verify one artifact and its whole ancestry; reads every byte, never the digest cache.

    Args:
        store: Where it lies.
        record: As read from the store, or as remembered from elsewhere (then the one on disk must equal it).
        deep: False compares names and sizes of files and the digests of records, and reads no payload.
        seen: Record digests that need no second look; pass one set to verify several artifacts together.

    Returns:
        Problems, the artifact's own first; empty when everything is what it was.
    """
    seen = set() if seen is None else seen
    problems: list[Problem] = []
    queue = [record]
    while queue:
        current = queue.pop(0)
        if current.record_digest in seen:
            continue
        seen.add(current.record_digest)
        directory = store.directory(current)
        problems += _record_problems(directory, current)
        hasher = file_sha256 if deep else None
        problems += payload_problems(directory, current, hasher)
        problems += run_problems(directory, current, hasher)
        for reference in current.inputs:
            path = (
                store.version_directory(current.experiment, reference.asset, reference.version) / RECORD_NAME
            )
            try:
                parent = read_record(path)
            except FileNotFoundError:
                message = f"made from {reference.asset}@{reference.version}, which is no longer in the store"
                problems.append(Problem("ancestor", version_name(current), RECORD_NAME, message))
                continue
            except RecordError as error:
                problems.append(Problem("ancestor", version_name(current), RECORD_NAME, str(error)))
                continue
            if (parent.record_digest, parent.digest) != (reference.record_digest, reference.digest):
                message = (
                    f"made from {reference.asset}@{reference.version} with record digest "
                    f"{reference.record_digest}, but the record there has {parent.record_digest}"
                )
                problems.append(Problem("ancestor", version_name(current), RECORD_NAME, message))
            queue.append(parent)
    return problems


def _record_problems(directory: Path, record: Record) -> list[Problem]:
    try:
        found = read_record(directory / RECORD_NAME).record_digest
    except FileNotFoundError:
        return [Problem("missing", version_name(record), RECORD_NAME, "missing")]
    except RecordError as error:
        return [Problem("record", version_name(record), RECORD_NAME, str(error))]
    if found != record.record_digest:
        message = f"record digest {found}, expected {record.record_digest}"
        return [Problem("record", version_name(record), RECORD_NAME, message)]
    return []
