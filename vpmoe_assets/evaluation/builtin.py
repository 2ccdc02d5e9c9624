"""A small bundle written for this project: the eight tasks' shapes with two dozen items each.

It shows that everything works where nothing can be downloaded, and in tests; its scores measure no ability
that anyone else has measured. Items are facts of everyday life put into the forms of the published tasks, in
a fixed order and with the right answer at changing places. Few-shot tasks show four examples instead of ten,
and baselines are those of blind guessing among an item's choices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from vpmoe_assets.evaluation.facts import ENDINGS, HOMES, LOSSES, METHODS, QUESTIONS, REASONS
from vpmoe_assets.evaluation.tasks import TASKS, Row, TaskRows

FEW_SHOT = 4
_BASELINES = {"boolq": 50.0, "commonsense_qa": 25.0}
"""Where the published tasks differ: theirs answer yes to 62 % of questions, and had five options once."""


def builtin_tasks() -> list[TaskRows]:
    """Return the eight tasks."""
    tasks = []
    for task in TASKS:
        shown = replace(
            task,
            few_shot=min(task.few_shot, FEW_SHOT),
            baseline_percent=_BASELINES.get(task.label, task.baseline_percent),
        )
        tasks.append(TaskRows(shown, list(_WRITERS[task.label]())))
    return tasks


def _placed(right: str, wrong: Sequence[str], number: int) -> tuple[list[str], int]:
    """Return the choices of item `number` and the place of the right one."""
    place = (7 * number + number // 4 + 3) % (len(wrong) + 1)
    return [*wrong[:place], right, *wrong[place:]], place


def _others(values: Sequence[str], number: int, count: int) -> list[str]:
    """Values of other items, as wrong answers."""
    return [values[(number + 5 * step + 2) % len(values)] for step in range(count)]


def _arc_easy() -> Iterator[Row]:
    for number, (question, right, *wrong) in enumerate(QUESTIONS):
        choices, gold = _placed(right, wrong, number)
        yield {"query": f"Question: {question}", "choices": choices, "gold": gold}


def _arc_challenge() -> Iterator[Row]:
    """Sum in words: distances, prices and areas."""
    for number in range(24):
        a, b = 3 + number % 7, 4 + number * 5 % 9
        question = (
            f"A cart rolls {a} metres every second without slowing down. How far is it after {b} seconds?",
            f"One loaf costs {a} coins. What do {b} loaves cost?",
            f"A floor is {a} metres wide and {b} metres long. How large is it?",
        )[number % 3]
        unit = ("metres", "coins", "square metres")[number % 3]
        wrong = [f"{value} {unit}" for value in (a * b + a, a + b, a * b - 1)]
        choices, gold = _placed(f"{a * b} {unit}", wrong, number)
        yield {"query": f"Question: {question}", "choices": choices, "gold": gold}


def _hellaswag() -> Iterator[Row]:
    endings = [ending for _, ending in ENDINGS]
    for number, (start, ending) in enumerate(ENDINGS):
        choices, gold = _placed(ending, _others(endings, number, 3), number)
        yield {"query": start, "choices": choices, "gold": gold}


def _lambada() -> Iterator[Row]:
    """Return a passage whose last word was named before, as only its first half tells."""
    for name, thing, place in LOSSES:
        context = (
            f"{name} had looked everywhere for the {thing}. It was not in the kitchen and not in the hall. "
            f'"Did you look in the {place}?" asked her brother. She went back once more, and he was right: '
            f"there, in the {place}, lay the"
        )
        yield {"context": context, "continuation": thing}


def _boolq() -> Iterator[Row]:
    for number, (thing, place) in enumerate(HOMES):
        other = HOMES[(number + 7) % len(HOMES)][1]
        asked = place if number % 2 else other
        passage = f"In our town every {thing} is kept in the {place}. Nothing of the kind is in the {other}."
        yield {
            "query": f"Passage: {passage}\nQuestion: is a {thing} kept in the {asked}?",
            "choices": ["no", "yes"],
            "gold": int(asked == place),
        }


def _commonsense_qa() -> Iterator[Row]:
    places = list(dict.fromkeys(place for _, place in HOMES))
    for number, (thing, place) in enumerate(HOMES):
        wrong = [other for other in _others(places, number, 6) if other != place][:3]
        choices, gold = _placed(place, wrong, number)
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))
        yield {
            "query": f"Question: Where would you look for a {thing}?\nChoices:\n{listed}\nAnswer:",
            "choices": ["A", "B", "C", "D"],
            "gold": gold,
        }


def _piqa() -> Iterator[Row]:
    for number, (goal, works, fails) in enumerate(METHODS):
        choices, gold = _placed(works, [fails], number)
        yield {"query": f"Question: {goal}", "choices": choices, "gold": gold}


def _winogrande() -> Iterator[Row]:
    for before, right, wrong, after in REASONS:
        swapped = len(after) % 2 == 0
        options = [wrong, right] if swapped else [right, wrong]
        yield {
            "context_options": [f"{before} {option}" for option in options],
            "continuation": after,
            "gold": int(swapped),
        }


_WRITERS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "arc_easy": _arc_easy,
    "arc_challenge": _arc_challenge,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "boolq": _boolq,
    "commonsense_qa": _commonsense_qa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
