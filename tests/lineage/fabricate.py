"""Small real artifacts, published through the store as an asset would."""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.indexed import pack_header
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.lineage.fingerprint import recipe_fingerprint
from vpmoe_assets.lineage.record import (
    EARLIER,
    RECORD_NAME,
    CodeState,
    Draft,
    Record,
    read_record,
    record_bytes,
)
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea

CODE = CodeState(git_sha="a" * 40, git_dirty=False, patch_digest=None, source_digest="b" * 64)
FILES = {"data.bin": b"\x00\x01\x02" * 100, "sub/odd name\n€.txt": "häßlich".encode()}
CODE_OF_STEP = Closure((), {"vpmoe_assets/synth.py": "c" * 64}, {"pyarrow": "21.0.0"})
_counter = itertools.count()


def recipe(asset: str, inputs: tuple[Record, ...] = (), **keys: Any) -> tuple[str, dict[str, Any]]:
    return recipe_fingerprint(
        {"asset": asset, **keys}, CODE_OF_STEP, {ref.asset: ref.digest for ref in inputs}
    )


def draft(
    payload: dict[str, Any],
    inputs: tuple[Record, ...] = (),
    accepted: Mapping[str, str] | None = None,
    **fields: Any,
) -> Draft:
    values: dict[str, Any] = {
        "fingerprint_payload": payload,
        "inputs": tuple(given.as_input(acceptance=(accepted or {}).get(given.asset)) for given in inputs),
        "execution": {"device": "cpu", "dp": 1},
        "seed": 1234,
        "code": CODE,
        "environment": {"python": "3.12.1", "host": "here", "packages": {"torch": "2.11.0"}},
        "command": ("dagster", "asset", "materialize"),
        "started_utc": "2026-01-31T11:00:00+00:00",
        "finished_utc": "2026-01-31T11:01:30+00:00",
    }
    return Draft.model_validate(values | fields)


def fill(work: WorkArea, files: Mapping[str, bytes] = FILES, manifest: Any = None) -> None:
    for name, content in files.items():
        path = work.payload / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if manifest is not None:
        work.manifest.write_text(json.dumps(manifest))


def publish(
    store: Store,
    asset: str,
    inputs: tuple[Record, ...] = (),
    *,
    files: Mapping[str, bytes] | None = None,
    manifest: Any = None,
    run: Mapping[str, bytes] | None = None,
    experiment: str = "smoke",
    recipe_keys: Mapping[str, Any] | None = None,
    checks: Sequence[Mapping[str, Any]] = (),
    accepted: Mapping[str, str] | None = None,
    **fields: Any,
) -> Record:
    """Publish one artifact; without ``recipe_keys`` every call has a recipe of its own.

    Each of the checks has a name and says whether it passed; a verdict is stated for it. Inputs that were
    taken because a person had accepted them are named with the statement's id.
    """
    keys = {"variant": next(_counter)} if recipe_keys is None else dict(recipe_keys)
    fingerprint, payload = recipe(asset, inputs, **keys)
    with store.work_area(experiment, asset, fingerprint) as work:
        fill(work, FILES if files is None else files, manifest)
        for name, content in (run or {}).items():
            (work.path / name).write_bytes(content)
        record = store.publish(work, draft(payload, inputs, accepted, **fields))
    for check in checks:
        state_verdict(store, record, **check)
    return record


def state_verdict(store: Store, record: Record, **check: Any) -> None:
    body = {
        "check": check["name"],
        "version": check.get("version", "1" * 64),
        "outcome": "passed" if check["passed"] else "failed",
        "blocking": check.get("blocking", True),
        "severity": check.get("severity", "ERROR"),
        "description": check.get("description", ""),
        "metadata": check.get("metadata", {}),
    }
    store.statements.append(Statement.about(record, "verdict", body, author="vpmoe"))


def index_of(lengths: Sequence[int] = (3, 2)) -> bytes:
    """The `.idx` of an IndexedDataset of int32."""
    sizes = np.array(lengths, "<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * 4
    documents = np.arange(len(lengths) + 1).astype("<i8")
    return pack_header(4, len(lengths)) + sizes.tobytes() + offsets.tobytes() + documents.tobytes()


def damage(path: Path, offset: int = 0) -> None:
    """Flip one bit of a published (read-only) file."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def files_below(root: Path) -> dict[str, bytes]:
    """Contents of every file below a directory, by relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def as_of_schema_1(store: Store, record: Record, checks: Sequence[Mapping[str, Any]] = ()) -> Record:
    """Rewrite a published record as the program before this one wrote it, in a store without a ledger."""
    later = {"objects", "blocking_checks", "original", "attempts"}
    fields = {name: value for name, value in record.to_dict().items() if name not in later}
    for reference in fields["inputs"]:
        del reference["acceptance"]
    path = store.directory(record) / RECORD_NAME
    path.chmod(0o644)
    path.write_bytes(
        record_bytes(Record.model_validate(fields | {"schema": EARLIER, "checks": list(checks)}))
    )
    path.chmod(0o444)
    shutil.rmtree(store.ledger.root, ignore_errors=True)
    return read_record(path)
