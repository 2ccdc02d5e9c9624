"""CORE-8: eight tasks of three types, few-shot, scored by likelihood, centred on the accuracy of guessing.

An item is rendered with solved examples before it, tokenised with BOS in front, and only part of it is
scored: where the choices differ (multiple choice), what follows them (schema), or the continuation (language
modelling). A choice's score is its mean cross-entropy per token and the lowest wins; a continuation counts
when every one of its tokens is the model's first choice. A sequence of more than `max_len` tokens loses its
beginning, each sequence for itself, BOS and oldest examples first.

With accuracy a and baseline b a task's centred score is (a − b) / (1 − b): 0 for guessing, 1 for perfect, and
the suite's score is the plain mean over tasks.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.schema.evaluate import Core8Protocol, EvaluateRecipe
from trainer.errors import EvaluationError
from trainer.evaluate.bundle import Item, Task, read_bundle
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.scoring import Scored, common_prefix, common_suffix, count_rows, score
from trainer.evaluate.suite import SuiteContext, SuiteResult
from trainer.job.workdir import LOGGER

BUNDLE_INPUT = "core8_bundle"
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Question:
    """An item, rendered and tokenised.

    Attributes:
        row: Number of the item in its file.
        gold: Index of the right choice; None for language modelling.
        sequences: One for each choice, or a single one.
        cropped: Sequences that lost their beginning.
    """

    row: int
    gold: int | None
    sequences: tuple[Scored, ...]
    cropped: int


@dataclass(frozen=True)
class Prompts:
    """The texts of an item.

    Attributes:
        answered: One for each choice; a single one for language modelling.
        question: The same without the answer, by which the answer's tokens are found.
    """

    answered: tuple[str, ...]
    question: str


def render(task: Task, item: Item, shots: Sequence[Item]) -> Prompts:
    """Texts of an item after its examples.

    The delimiter belongs to the answer: most tokenizers join a space with the word that follows it, so a
    question that ended in one would be another question.

    Args:
        task: Its task.
        item: The item.
        shots: Solved examples, in order.
    """
    before = "".join(_solved(task, shot) + _BETWEEN for shot in shots)
    if task.type == "multiple_choice":
        question = before + item["query"]
        answers = item["choices"]
    elif task.type == "schema":
        options = [before + option for option in item["context_options"]]
        return Prompts(tuple(text + task.delimiter + item["continuation"] for text in options), before)
    else:
        question = before + item["context"].strip()
        answers = [item["continuation"]]
    return Prompts(tuple(question + task.delimiter + answer for answer in answers), question)


def _solved(task: Task, item: Item) -> str:
    if task.type == "multiple_choice":
        return str(item["query"] + task.delimiter + item["choices"][item["gold"]])
    if task.type == "schema":
        return str(item["context_options"][item["gold"]] + task.delimiter + item["continuation"])
    return str(item["context"].strip() + task.delimiter + item["continuation"])


def draw_shots(kept: Sequence[tuple[int, Item]], place: int, task: Task, seed: int) -> list[Item]:
    """Return the examples of the item at `place`: drawn with a seed of its own from all other kept items."""
    others = [number for number in range(len(kept)) if number != place]
    return [kept[number][1] for number in random.Random(seed + place).sample(others, task.few_shot)]


def spans(task: Task, sequences: Sequence[Sequence[int]], question: Callable[[], Sequence[int]]) -> list[int]:
    """Where the scored part of each sequence begins; it ends with the sequence.

    Multiple choice: after the longest common prefix of all choices. Where that is the whole of one of them
    (a choice continues another), after the question alone, for all. Schema: the longest common suffix.
    Language modelling: after the longest common prefix with the question.

    Args:
        task: The task.
        sequences: Ids of the answered prompts, BOS first.
        question: Makes the ids of the prompt without its answer.

    Returns:
        An index for each sequence.

    Raises:
        EvaluationError: Nothing is left to score.
    """
    if task.type == "schema":
        shared = common_suffix(sequences)
        starts = [len(tokens) - shared for tokens in sequences]
    else:
        shared = common_prefix(sequences)
        if any(len(tokens) == shared for tokens in sequences):
            asked = question()
            shared = min(common_prefix([tokens, asked]) for tokens in sequences)
        starts = [shared] * len(sequences)
    starts = [max(1, start) for start in starts]  # nothing predicts BOS
    for tokens, start in zip(sequences, starts, strict=True):
        if start >= len(tokens):
            raise EvaluationError("an empty span would be scored: the answer adds no token to the question")
    return starts


def crop(tokens: Sequence[int], start: int, max_len: int) -> Scored:
    """Keep the last `max_len` tokens of a sequence.

    Raises:
        EvaluationError: Not even what precedes the scored part by one token is left.
    """
    lost = max(0, len(tokens) - max_len)
    if start - lost < 1:
        raise EvaluationError(
            f"the scored part has {len(tokens) - start} tokens, which max_len = {max_len} cuts into"
        )
    return Scored(tokens[lost:], start - lost)


def prepare(task: Task, tokenizer: Tokenizer, protocol: Core8Protocol, max_len: int) -> tuple[Question, ...]:
    """Render, tokenises and crops the kept items of a task.

    Raises:
        EvaluationError: An item leaves nothing to score; the message names it.
    """
    kept = task.keep(protocol.seed, protocol.max_per_task)
    prompts = []
    for place, (_, item) in enumerate(kept):
        shots = draw_shots(kept, place, task, protocol.few_shot_seed)
        prompts.append(render(task, item, shots))
    encoded = iter(tokenizer.encode_many([text for item in prompts for text in item.answered]))
    questions = []
    for (row, item), texts in zip(kept, prompts, strict=True):
        sequences = [[tokenizer.bos, *next(encoded)] for _ in texts.answered]

        def asked(text: str = texts.question) -> list[int]:
            return [tokenizer.bos, *tokenizer.encode(text)]

        try:
            starts = spans(task, sequences, asked)
            scored = [crop(tokens, start, max_len) for tokens, start in zip(sequences, starts, strict=True)]
        except EvaluationError as error:
            raise EvaluationError(f"{task.label}, row {row}: {error}") from None
        cropped = sum(len(tokens) > max_len for tokens in sequences)
        questions.append(Question(row, item.get("gold"), tuple(scored), cropped))
    return tuple(questions)


def standard_error(correct: int, total: int) -> float:
    """Return the standard error of an accuracy: sqrt(p (1 − p) / (n − 1)); 0 for a single item."""
    p = correct / total
    return math.sqrt(p * (1 - p) / (total - 1)) if total > 1 else 0.0


def evaluate_task(
    model: LanguageModel, task: Task, protocol: Core8Protocol, max_len: int, context: SuiteContext
) -> dict[str, Any]:
    """Ask a task's items.

    Returns:
        `items` (one object each: row, gold, prediction, mean NLL and tokens of each choice, correct, cropped)
        And the counts `correct`, `total`, `cropped` (items that lost their beginning).
    """
    questions = prepare(task, model.tokenizer, protocol, max_len)
    groups = [question.sequences for question in questions]
    with context.progress(count_rows(model, groups), task.label) as bar:

        def tick(rows: int) -> None:
            bar.update(rows)
            context.check_stop()

        scores = score(model, groups, context.batching, tick=tick)
    items: list[dict[str, Any]] = []
    for question, found in zip(questions, scores, strict=True):
        losses = [choice.mean_nll for choice in found]
        if question.gold is None:
            prediction, correct = None, bool(found[0].greedy.all())
        else:
            prediction = min(range(len(losses)), key=losses.__getitem__)
            correct = prediction == question.gold
        items.append(
            {
                "task": task.label,
                "row": question.row,
                "gold": question.gold,
                "prediction": prediction,
                "correct": correct,
                "nll": losses,
                "tokens": [len(choice.logprobs) for choice in found],
                "cropped": question.cropped,
            }
        )
    return {
        "items": items,
        "correct": sum(item["correct"] for item in items),
        "total": len(items),
        "cropped": sum(item["cropped"] > 0 for item in items),
    }


def summarise(tasks: Sequence[Task], counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Scores of a suite from its integer counts.

    Args:
        tasks: All tasks.
        counts: `correct`, `total` and `cropped` of each, by label.
    """
    accuracy, centred, errors, centred_errors = {}, {}, {}, {}
    for task in tasks:
        count = counts[task.label]
        accuracy[task.label] = count["correct"] / count["total"]
        errors[task.label] = standard_error(count["correct"], count["total"])
        centred[task.label] = (accuracy[task.label] - task.baseline) / (1 - task.baseline)
        centred_errors[task.label] = errors[task.label] / (1 - task.baseline)
    n = len(tasks)
    return {
        "results": accuracy,
        "centered_results": centred,
        "core8_centered_mean": sum(centred.values()) / n,
        "counts": {task.label: dict(counts[task.label]) for task in tasks},
        "stderr": {
            "tasks": errors,
            "core8_centered_mean": math.sqrt(sum(error**2 for error in centred_errors.values())) / n,
        },
        "baselines": {task.label: task.baseline for task in tasks},
    }


def run(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
    """Measure a checkpoint on every task of the bundle."""
    protocol = recipe.core8
    assert protocol is not None, "the recipe's own check requires it"
    bundle = read_bundle(context.input(BUNDLE_INPUT, "the core8 suite"))
    counts: dict[str, dict[str, int]] = {}
    items: list[dict[str, Any]] = []
    for task in bundle.tasks:
        identity = {
            "checkpoint": context.digests[context.object],
            "bundle": task.sha256,
            "task": [task.type, task.few_shot, task.delimiter],
            "protocol": protocol.model_dump(mode="json"),
            "max_len": recipe.max_len,
            "dtype": recipe.dtype,
            "device": model.device.type,
            "tokenizer": model.tokenizer.fingerprint,
        }

        def compute(task: Task = task) -> dict[str, Any]:
            return evaluate_task(model, task, protocol, recipe.max_len, context)

        found = context.once(f"core8/{task.label}", identity, compute)
        items += found["items"]
        counts[task.label] = {key: found[key] for key in ("correct", "total", "cropped")}
        LOGGER.info("%s %s: %d of %d", context.object, task.label, found["correct"], found["total"])
    report = summarise(bundle.tasks, counts) | {"bundle": dict(bundle.source)}
    metrics: dict[str, int | float] = {
        "core8/centered_mean": report["core8_centered_mean"],
        "core8/centered_mean_stderr": report["stderr"]["core8_centered_mean"],
    }
    for task in bundle.tasks:
        metrics[f"core8/{task.label}/acc"] = report["results"][task.label]
        metrics[f"core8/{task.label}/centered"] = report["centered_results"][task.label]
        metrics[f"core8/{task.label}/stderr"] = report["stderr"]["tasks"][task.label]
    return SuiteResult(metrics=metrics, report=report, items=items)
