"""The published bundle: one zip file, pinned by sha256, with every task and the table of baselines."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from trainer.contract.json_text import JsonError, json_lines
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.archives import UNREADABLE, read_member
from vpmoe_assets.evaluation.tasks import TASKS, Row, TaskRows
from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.network import PATIENCE, Patience, bytes_of, client_of, receive

ROOT = "eval_bundle"
BASELINES = f"{ROOT}/eval_meta_data.csv"


def fetch_zip(
    url: str,
    sha256: str,
    cache: Path,
    *,
    progress: Callable[[int], None] = lambda _: None,
    patience: Patience = PATIENCE,
) -> Path:
    """Bring the zip here, going on from what an earlier attempt left.

    Args:
        url: Its address.
        sha256: What its bytes must have; also its name in the cache.
        cache: Kept between attempts.
        progress: Called with the number of new bytes.
        patience: With a server that is silent or busy, and with connections that break.

    Returns:
        Its path.

    Raises:
        NetworkError: It cannot be fetched; what came is kept.
        DataError: It has another sha256 (what was received is then removed).
    """
    cache.mkdir(parents=True, exist_ok=True)
    target, partial = cache / f"{sha256}.zip", cache / f".{sha256}.part"
    if target.is_file() and file_sha256(target) == sha256:
        return target
    begun = partial.is_file()
    while True:
        _complete(url, partial, progress, patience)
        if (found := file_sha256(partial)) == sha256:
            break
        partial.unlink()
        if not begun:
            raise DataError(
                f"{url}: received bytes with sha256 {found}, expected {sha256}; they were removed. The file "
                "has changed, or sources.core8.sha256 is not its digest"
            )
        begun = False  # what an earlier attempt left was not its beginning: once more, from the start
    partial.replace(target)
    return target


def _complete(url: str, partial: Path, progress: Callable[[int], None], patience: Patience) -> None:
    import httpx

    client = client_of(httpx.Client)
    with client:
        receive(
            lambda offset: bytes_of(client, url, url, offset=offset),
            partial,
            url,
            size=None,
            patience=patience,
            seen=lambda chunk: progress(len(chunk)),
        )


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
            baselines = _baselines(read_member(archive, BASELINES))
            tasks = []
            for task in TASKS:
                content = read_member(archive, f"{ROOT}/eval_data/{task.uri}")
                if task.label not in baselines:
                    raise DataError(
                        f"{BASELINES} has no random baseline of {task.label}; without it a score cannot be "
                        "centred"
                    )
                known = replace(task, baseline_percent=baselines[task.label])
                tasks.append(TaskRows(known, list(_rows(content, task.uri))))
            return tasks
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path} is not a zip file that can be read: {error}") from error


def _baselines(content: bytes) -> dict[str, float]:
    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    try:
        return _percents(table)
    except csv.Error as error:
        raise DataError(f"{BASELINES} is no table of values with commas ({error})") from error


def _percents(table: "csv.DictReader[str]") -> dict[str, float]:
    if not {"Eval Task", "Random baseline"} <= set(table.fieldnames or ()):
        raise DataError(f"{BASELINES} has the columns {table.fieldnames}, not 'Eval Task', 'Random baseline'")
    found = {}
    for line in table:
        try:
            percent = float(line["Random baseline"])
        except (TypeError, ValueError):
            continue  # a task without one; it is missed above if it is among the eight
        if 0 <= percent < 100:  # NaN is none either
            found[line["Eval Task"]] = percent
    return found


def _rows(content: bytes, uri: str) -> Iterator[Row]:
    try:
        for number, row in json_lines(io.BytesIO(content)):
            if not isinstance(row, dict):
                raise DataError(f"{uri}, line {number}: a JSON {type(row).__name__}, expected an object")
            yield row
    except JsonError as error:
        raise DataError(f"{uri}, {error}") from error
