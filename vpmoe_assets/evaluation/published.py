"""The published bundle: one zip file, pinned by sha256, with every task and the table of baselines."""

import csv
import io
import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.tasks import TASKS, Row, TaskRows
from vpmoe_assets.lineage.digest import file_sha256

ROOT = "eval_bundle"
BASELINES = f"{ROOT}/eval_meta_data.csv"
_CHUNK = 1 << 20
_TIMEOUT_S = 60


def fetch_zip(
    url: str, sha256: str, cache: Path, *, progress: Callable[[int], None] = lambda _: None
) -> Path:
    """Bring the zip here, going on from what an earlier attempt left.

    Args:
        url: Its address.
        sha256: What its bytes must have; also its name in the cache.
        cache: Kept between attempts.
        progress: Called with the number of new bytes.

    Returns:
        Its path.

    Raises:
        DataError: It cannot be fetched, or has another sha256 (what was received is then removed).
    """
    cache.mkdir(parents=True, exist_ok=True)
    target, partial = cache / f"{sha256}.zip", cache / f".{sha256}.part"
    if target.is_file() and file_sha256(target) == sha256:
        return target
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            resumed = have > 0 and response.status == 206
            with partial.open("ab" if resumed else "wb") as stream:
                while chunk := response.read(_CHUNK):
                    stream.write(chunk)
                    progress(len(chunk))
                stream.flush()
                os.fsync(stream.fileno())
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the whole file is here already: nothing lies behind its end
            raise DataError(f"{url}: {error.code} {error.reason}; check sources.core8.url") from error
    except OSError as error:
        raise DataError(
            f"{url} cannot be fetched ({error}); start again when the network is back, it goes on there"
        ) from error
    if (found := file_sha256(partial)) != sha256:
        partial.unlink()
        raise DataError(
            f"{url}: received bytes with sha256 {found}, expected {sha256}; they were removed. The file has "
            "changed, or sources.core8.sha256 is not its digest"
        )
    partial.replace(target)
    return target


def zip_tasks(path: Path) -> list[TaskRows]:
    """Read the eight tasks and their baselines.

    Raises:
        DataError: The zip has no `eval_bundle/`, a file is missing or malformed, or the table of baselines
            lacks a task.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if not any(name.startswith(f"{ROOT}/") for name in names):
                raise DataError(f"{path} holds no {ROOT}/: it is not an evaluation bundle")
            baselines = _baselines(_member(archive, BASELINES))
            tasks = []
            for task in TASKS:
                content = _member(archive, f"{ROOT}/eval_data/{task.uri}")
                if task.label not in baselines:
                    raise DataError(
                        f"{BASELINES} has no random baseline of {task.label}; without it a score cannot be "
                        "centred"
                    )
                known = replace(task, baseline_percent=baselines[task.label])
                tasks.append(TaskRows(known, list(_rows(content, task.uri))))
            return tasks
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a zip file: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise DataError(f"{archive.filename} lacks {name}") from None


def _baselines(content: bytes) -> dict[str, float]:
    table = csv.DictReader(io.StringIO(content.decode("utf-8")))
    if not {"Eval Task", "Random baseline"} <= set(table.fieldnames or ()):
        raise DataError(f"{BASELINES} has the columns {table.fieldnames}, not 'Eval Task', 'Random baseline'")
    found = {}
    for line in table:
        try:
            found[line["Eval Task"]] = float(line["Random baseline"])
        except (TypeError, ValueError):
            continue  # a task without one; it is missed above if it is among the eight
    return found


def _rows(content: bytes, uri: str) -> Iterator[Row]:
    for number, line in enumerate(content.decode("utf-8").splitlines()):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{uri}, line {number}: not JSON ({error})") from error
