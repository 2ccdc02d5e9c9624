"""The CORE-8 bundle as the trainer reads it: one JSON-lines file a task, and a table that says what they are.

```
payload/
  tasks.json      schema vpmoe.core8_bundle/1: source, and label, file, sha256, rows, type, few_shot,
                  delimiter, baseline_percent of each task
  arc_easy.jsonl  one item a line …
```

Items by type: `multiple_choice` has `query`, `choices` and `gold`; `schema` has `context_options`,
`continuation` and `gold`; `language_modeling` has `context` and `continuation`.
"""

import hashlib
import io
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.json_text import JsonError, json_lines, parse_json
from trainer.errors import EvaluationError

SCHEMA = "vpmoe.core8_bundle/1"
TABLE_NAME = "tasks.json"
TaskType = Literal["multiple_choice", "schema", "language_modeling"]
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
_FILE_NAME = re.compile(r"\w[\w.\-]*", re.ASCII)
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task of the bundle.

    Attributes:
        label: Name.
        type: How its items are asked and scored.
        few_shot: Solved examples shown before an item.
        delimiter: Text between question and answer.
        baseline: Accuracy of guessing, in [0, 1).
        sha256: Of its file.
        rows: Items in the file's order.
    """

    label: str
    type: TaskType
    few_shot: int
    delimiter: str
    baseline: float
    sha256: str
    rows: tuple[Item, ...]

    def keep(self, seed: int, at_most: int) -> list[tuple[int, Item]]:
        """Return the items of an evaluation: shuffled by the seed, the first few of them.

        Args:
            seed: Of the shuffle.
            at_most: Items to keep.

        Returns:
            Pairs of number in the file and item.

        Raises:
            EvaluationError: Too few are left to draw the examples from.
        """
        kept = list(enumerate(self.rows))
        random.Random(seed).shuffle(kept)
        kept = kept[:at_most]
        if len(kept) <= self.few_shot:
            raise EvaluationError(
                f"{self.label}: {len(kept)} items are kept, but each is shown {self.few_shot} others as "
                "examples; raise core8.max_per_task or give a larger bundle"
            )
        return kept


@dataclass(frozen=True)
class Bundle:
    """All tasks, and where they came from."""

    source: Mapping[str, Any]
    tasks: tuple[Task, ...]


def read_bundle(directory: Path) -> Bundle:
    """Read and check a bundle.

    Args:
        directory: Payload of the `core8_bundle` artifact.

    Raises:
        EvaluationError: A file is missing, has another sha256 or another number of rows than the table says,
            a row is malformed, or a task has no random baseline.
    """
    path = directory / TABLE_NAME
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{directory} holds no {TABLE_NAME}: it is not a CORE-8 bundle") from None
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        found = table.get("schema") if isinstance(table, dict) else type(table).__name__
        raise EvaluationError(f"{path}: schema {found!r} found, {SCHEMA!r} expected")
    try:
        tasks = tuple(_read_task(directory, entry) for entry in table["tasks"])
        source = table["source"]
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is damaged ({error!r}); materialise core8_bundle again") from error
    if not tasks:
        raise EvaluationError(f"{path} lists no tasks")
    return Bundle(source, tasks)


def _read_task(directory: Path, entry: Mapping[str, Any]) -> Task:
    label, kind = entry["label"], entry["type"]
    if kind not in _FIELDS:
        raise EvaluationError(f"{label}: type {kind!r} found; known are {', '.join(_FIELDS)}")
    percent = entry.get("baseline_percent")
    if not isinstance(percent, int | float) or not 0 <= percent < 100:
        raise EvaluationError(
            f"{label}: baseline_percent is {percent!r}; the accuracy of guessing is needed to centre a "
            "score, and 0 is not assumed for a task that has none"
        )
    if not isinstance(entry["file"], str) or not _FILE_NAME.fullmatch(entry["file"]):
        raise EvaluationError(f"{label}: file {entry['file']!r} is none of the bundle's directory")
    path = directory / entry["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{label}: {path} cannot be read ({error.strerror})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise EvaluationError(
            f"{path}: sha256 is {found}, {TABLE_NAME} says {entry['sha256']}; materialise core8_bundle again"
        )
    try:
        rows = tuple(row for _, row in json_lines(io.BytesIO(content)))
    except JsonError as error:
        raise EvaluationError(f"{path}, {error}; materialise core8_bundle again") from error
    if len(rows) != entry["rows"]:
        raise EvaluationError(f"{path}: {len(rows)} rows, {TABLE_NAME} says {entry['rows']}")
    for number, row in enumerate(rows):
        check_item(kind, row, f"{path.name}, row {number}")
    return Task(
        label=label,
        type=kind,
        few_shot=entry["few_shot"],
        delimiter=entry["delimiter"],
        baseline=percent / 100,
        sha256=found,
        rows=rows,
    )


def check_item(kind: str, item: Item, where: str) -> None:
    """Refuse an item without the fields of its type, or whose right answer is none of its choices.

    Raises:
        EvaluationError: Naming the item and the field.
    """
    if not isinstance(item, dict):
        raise EvaluationError(f"{where}: a {type(item).__name__}; an item is an object")
    for name, expected in _FIELDS[kind].items():
        value = item.get(name)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise EvaluationError(f"{where}: {name} = {value!r}; a {kind} item needs a {expected.__name__}")
    options = item.get("choices", item.get("context_options"))
    if options is not None and (len(options) < 2 or not 0 <= item["gold"] < len(options)):
        raise EvaluationError(
            f"{where}: gold = {item['gold']} with {len(options)} choices; it must be one of at least two"
        )
