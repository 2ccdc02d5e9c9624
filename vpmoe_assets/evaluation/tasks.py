"""The eight tasks: how each is asked, where the published bundle keeps it, and what guessing scores.

Few-shot counts, types and delimiters are those of DCLM's CORE evaluation, from which the eight are taken; so
are the baselines, which a published bundle states itself in its `eval_meta_data.csv`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vpmoe_assets.errors import DataError

Row = Mapping[str, Any]
ANSWER = "\nAnswer: "

FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""Fields of an item by the type of its task; anything else that a source carries is dropped."""


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        label: Name.
        uri: File below the published bundle's `eval_data/`.
        few_shot: Solved examples before each item.
        type: `multiple_choice`, `schema` or `language_modeling`.
        delimiter: Between question and answer.
        baseline_percent: Accuracy of guessing, in percent.
        rows: Items of the published task.
    """

    label: str
    uri: str
    few_shot: int
    type: str
    delimiter: str
    baseline_percent: float
    rows: int


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task, from one source.

    Attributes:
        task: The task; its `few_shot` and `baseline_percent` are the source's.
        rows: Its items in the source's order.
    """

    task: TaskSpec
    rows: Iterable[Row]


_MC, _LM, _SCHEMA = "multiple_choice", "language_modeling", "schema"
TASKS = (
    TaskSpec("arc_easy", "world_knowledge/arc_easy.jsonl", 10, _MC, ANSWER, 25, 2376),
    TaskSpec("arc_challenge", "world_knowledge/arc_challenge.jsonl", 10, _MC, ANSWER, 25, 1172),
    TaskSpec("hellaswag", "language_understanding/hellaswag.jsonl", 10, _MC, " ", 25, 10042),
    TaskSpec("lambada_openai", "language_understanding/lambada_openai.jsonl", 0, _LM, " ", 0, 5153),
    TaskSpec("boolq", "reading_comprehension/boolq.jsonl", 10, _MC, ANSWER, 62, 3270),
    TaskSpec("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl", 10, _MC, " ", 20, 1221),
    TaskSpec("piqa", "commonsense_reasoning/piqa.jsonl", 10, _MC, ANSWER, 50, 1838),
    TaskSpec("winogrande", "language_understanding/winogrande.jsonl", 0, _SCHEMA, " ", 50, 1267),
)


def normalise(task: TaskSpec, row: Row, where: str) -> dict[str, Any]:
    """Return the fields of a task's item, checked.

    Raises:
        DataError: A field is missing or of another type, or the right answer is none of the choices.
    """
    try:
        item = {field: row[field] for field in FIELDS[task.type]}
    except KeyError as error:
        raise DataError(
            f"{where}: a {task.type} item needs the field {error}; it has {sorted(row)}"
        ) from None
    for field, value in item.items():
        if field == "gold":
            options = item.get("choices", item.get("context_options"))
            assert options is not None
            if type(value) is not int or not 0 <= value < len(options):
                raise DataError(f"{where}: gold = {value!r} is none of its {len(options)} choices")
        elif field in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
                raise DataError(f"{where}: {field} must be two texts or more, found {value!r}")
        elif not isinstance(value, str):
            raise DataError(f"{where}: {field} must be text, found {value!r}")
    return item
