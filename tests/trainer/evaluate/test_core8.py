"""CORE-8 against its protocol spelt out, and against `transformers` one prompt at a time."""

import json
import math
import random
import re

import numpy as np
import pytest

from tests.trainer.evaluate.evaluation_inputs import context, plain_logprobs, write_bundle, write_task
from trainer.contract.schema.evaluate import Core8Protocol, EvaluateRecipe, Generation, HuggingFaceCheckpoint
from trainer.errors import EvaluationError
from trainer.evaluate.bundle import read_bundle
from trainer.evaluate.core8 import crop, draw_shots, prepare, render, run, spans, standard_error
from trainer.job.lifecycle import Interrupted

PROTOCOL = Core8Protocol(seed=1337, max_per_task=9)


def recipe(max_len: int = 1024, kept: int = 9) -> EvaluateRecipe:
    return EvaluateRecipe(
        checkpoints={"object": HuggingFaceCheckpoint()},
        suites=("core8",),
        max_len=max_len,
        dtype="fp32",
        ppl_tokens=1,
        generation=Generation(prompts=1, max_new_tokens=1, greedy=True),
        core8=Core8Protocol(seed=1337, max_per_task=kept),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def by_hand(model, task, place, kept):
    """Correctness and mean losses of one item, from the protocol's sentences and nothing of ours."""
    rows = [row for _, row in kept]
    others = [i for i in range(len(rows)) if i != place]
    shots = [rows[i] for i in random.Random(1234 + place).sample(others, task.few_shot)]
    row = rows[place]
    encode = model.module_tokenizer

    def ids(text):
        return [model.tokenizer.bos, *encode(text, add_special_tokens=False)["input_ids"]]

    if task.type == "multiple_choice":
        before = "".join(f"{s['query']}{task.delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        sequences = [ids(f"{before}{row['query']}{task.delimiter}{choice}") for choice in row["choices"]]
        start = 0
        while len({tuple(sequence[: start + 1]) for sequence in sequences}) == 1:
            start += 1
        starts = [start] * len(sequences)
    elif task.type == "schema":
        sequences = [
            ids(f"{option}{task.delimiter}{row['continuation']}") for option in row["context_options"]
        ]
        shared = 0
        while len({tuple(sequence[len(sequence) - shared - 1 :]) for sequence in sequences}) == 1:
            shared += 1
        starts = [len(sequence) - shared for sequence in sequences]
    else:
        text = row["context"].strip()
        sequences = [ids(f"{text}{task.delimiter}{row['continuation']}")]
        assert sequences[0][: len(ids(text))] == ids(text)
        starts = [len(ids(text))]
    scored = [plain_logprobs(model.module, sequence) for sequence in sequences]
    losses = [-float(np.mean(p[start - 1 :])) for (p, _), start in zip(scored, starts, strict=True)]
    if task.type == "language_modeling":
        return bool(scored[0][1][starts[0] - 1 :].all()), losses
    return int(np.argmin(losses)) == row["gold"], losses


def test_every_task_type_agrees_with_transformers_scoring_each_prompt_alone(
    llama, llama_dir, bundle, tmp_path
):
    from transformers import AutoTokenizer

    llama.module_tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    result = run(llama, recipe(), context(tmp_path, core8_bundle=bundle))
    for task in read_bundle(bundle).tasks:
        kept = list(enumerate(task.rows))
        random.Random(1337).shuffle(kept)
        kept = kept[:9]
        items = [item for item in result.items if item["task"] == task.label]
        assert [item["row"] for item in items] == [row for row, _ in kept]
        for place, item in enumerate(items):
            correct, losses = by_hand(llama, task, place, kept)
            np.testing.assert_allclose(item["nll"], losses, rtol=1e-4)
            assert item["correct"] is correct
        right = sum(item["correct"] for item in items)
        assert result.report["counts"][task.label] == {"correct": right, "total": 9, "cropped": 0}
        assert result.report["results"][task.label] == right / 9
        centred = (right / 9 - task.baseline) / (1 - task.baseline)
        assert result.report["centered_results"][task.label] == pytest.approx(centred)
    centred = result.report["centered_results"].values()
    assert result.report["core8_centered_mean"] == pytest.approx(sum(centred) / 4)
    assert len({tuple(item["nll"]) for item in result.items}) == len(result.items)


@pytest.mark.parametrize("kind", ["llama", "student"])
def test_batches_of_one_and_of_many_give_the_same_report(kind, request, bundle, tmp_path):
    model = request.getfixturevalue(kind)
    one = run(model, recipe(kept=4), context(tmp_path / "one", rows=1, tokens=1, core8_bundle=bundle))
    many = run(model, recipe(kept=4), context(tmp_path / "many", rows=32, core8_bundle=bundle))
    assert one.report == many.report
    for left, right in zip(one.items, many.items, strict=True):
        np.testing.assert_allclose(left["nll"], right["nll"], rtol=1e-4)
        assert left["prediction"] == right["prediction"]
    again = run(model, recipe(kept=4), context(tmp_path / "again", rows=32, core8_bundle=bundle))
    assert again == many


def test_language_modelling_keeps_the_delimiter_and_scores_the_continuation(tmp_path, llama):
    rows = [{"context": f"\n one {n} two ", "continuation": "three"} for n in range(3)]
    write_task(tmp_path, "lm", "language_modeling", rows, few_shot=1)
    (task,) = read_bundle(tmp_path).tasks
    assert render(task, rows[0], [rows[1]]).answered == ("one 1 two three\n\none 0 two three",)
    for question in prepare(task, llama.tokenizer, PROTOCOL, 100):
        (sequence,) = question.sequences
        assert llama.tokenizer.decode(sequence.tokens[sequence.start :]) == " three"


def test_prompts_of_choices_and_of_schemas(tmp_path):
    choices = [{"query": f"q{n}", "choices": ["x", "y"], "gold": 1} for n in range(3)]
    options = [{"context_options": ["a", f"b{n}"], "continuation": "c", "gold": 1} for n in range(3)]
    write_task(tmp_path, "choice", "multiple_choice", choices, delimiter="\nAnswer: ")
    write_task(tmp_path, "schema", "schema", options)
    choice, schema = read_bundle(tmp_path).tasks
    before = "q1\nAnswer: y\n\nq2\nAnswer: y\n\n"
    assert render(choice, choices[0], choices[1:]).answered == (
        f"{before}q0\nAnswer: x",
        f"{before}q0\nAnswer: y",
    )
    assert render(schema, options[0], options[1:2]).answered == ("b1 c\n\na c", "b1 c\n\nb0 c")


def test_examples_are_other_kept_items_and_change_with_the_item(bundle):
    task = read_bundle(bundle).tasks[0]
    kept = task.keep(1337, 9)
    drawn = [draw_shots(kept, place, task, 1234) for place in range(9)]
    texts = {row["query"] for _, row in kept}
    for place, shots in enumerate(drawn):
        assert len(shots) == 2
        assert {shot["query"] for shot in shots} <= texts - {kept[place][1]["query"]}
    assert len({json.dumps(shots) for shots in drawn}) > 5
    assert drawn == [draw_shots(kept, place, task, 1234) for place in range(9)]


def test_a_choice_that_continues_another_is_scored_from_the_question_on(tmp_path, llama):
    rows = [{"query": f"{n}?", "choices": ["sand", "sand and stone"], "gold": 0} for n in range(3)]
    write_task(tmp_path, "choice", "multiple_choice", rows, few_shot=0, delimiter=" ")
    (task,) = read_bundle(tmp_path).tasks
    for question in prepare(task, llama.tokenizer, PROTOCOL, 100):
        scored = [llama.tokenizer.decode(s.tokens[s.start :]) for s in question.sequences]
        assert scored == [" sand", " sand and stone"]


def test_an_empty_span_is_refused_naming_the_item(tmp_path, llama):
    rows = [{"context": f"one {n}", "continuation": ""} for n in range(2)]
    write_task(tmp_path, "lm", "language_modeling", rows, few_shot=0, delimiter="")
    (task,) = read_bundle(tmp_path).tasks
    with pytest.raises(EvaluationError, match=r"lm, row \d: an empty span"):
        prepare(task, llama.tokenizer, PROTOCOL, 100)
    with pytest.raises(EvaluationError, match="empty span"):
        spans(read_bundle(write_bundle(tmp_path / "b")).tasks[2], [[1, 2], [1, 3]], lambda: [1])


def test_long_prompts_lose_their_beginning_and_are_counted(llama, bundle, tmp_path):
    whole = run(llama, recipe(), context(tmp_path / "a", core8_bundle=bundle))
    cut = run(llama, recipe(max_len=60), context(tmp_path / "b", core8_bundle=bundle))
    assert cut.report["counts"]["choice"]["cropped"] == 9
    assert cut.report["counts"]["pronoun"]["cropped"] == 0
    assert [item["tokens"] for item in cut.items] == [item["tokens"] for item in whole.items]
    task = read_bundle(bundle).tasks[0]
    questions = prepare(task, llama.tokenizer, PROTOCOL, 60)
    item = next(item for item in cut.items if item["row"] == questions[0].row)
    for sequence, loss in zip(questions[0].sequences, item["nll"], strict=True):
        assert len(sequence.tokens) == 60
        logprobs, _ = plain_logprobs(llama.module, list(sequence.tokens))
        assert loss == pytest.approx(-float(np.mean(logprobs[sequence.start - 1 :])), rel=1e-4)


def test_a_crop_that_would_cut_into_the_answer_is_refused():
    assert crop(range(10), 8, 3).start == 1
    with pytest.raises(EvaluationError, match="max_len = 2 cuts into"):
        crop(range(10), 8, 2)


def test_standard_errors_follow_the_sample():
    answers = np.array([1] * 32 + [0] * 18)
    assert standard_error(32, 50) == pytest.approx(answers.std(ddof=1) / math.sqrt(50))
    assert standard_error(1, 1) == 0.0


def test_finished_tasks_are_not_asked_again_after_a_stop(llama, bundle, tmp_path, monkeypatch):
    asked: list[str] = []
    from trainer.evaluate import core8

    def counted(model, task, *rest):
        asked.append(task.label)
        if task.label == "pronoun" and asked.count("pronoun") == 1:
            interrupted.stop.request("a test")
        return real(model, task, *rest)

    real = core8.evaluate_task
    monkeypatch.setattr(core8, "evaluate_task", counted)
    interrupted = context(tmp_path, core8_bundle=bundle)
    with pytest.raises(Interrupted):
        run(llama, recipe(), interrupted)
    result = run(llama, recipe(), context(tmp_path, core8_bundle=bundle))
    assert asked == ["choice", "letter", "pronoun", "pronoun", "last_word"]
    assert result == run(llama, recipe(), context(tmp_path / "fresh", core8_bundle=bundle))
    asked.clear()
    run(llama, recipe(kept=5), context(tmp_path, core8_bundle=bundle))
    assert asked == ["choice", "letter", "pronoun", "last_word"]


def test_too_few_items_for_the_examples_are_refused(llama, bundle, tmp_path):
    with pytest.raises(EvaluationError, match="choice: 2 items are kept"):
        run(llama, recipe(kept=2), context(tmp_path, core8_bundle=bundle))


def damage(directory, label, **changes):
    path = directory / "tasks.json"
    table = json.loads(path.read_text())
    (entry,) = [entry for entry in table["tasks"] if entry["label"] == label]
    for key, value in changes.items():
        if value is None:
            del entry[key]
        else:
            entry[key] = value
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, r"choice.jsonl: sha256 is [0-9a-f]{64}, tasks.json says 0000"),
        ({"baseline_percent": None}, "choice: baseline_percent is None"),
        ({"baseline_percent": 100}, "choice: baseline_percent is 100"),
        ({"rows": 11}, "choice.jsonl: 12 rows, tasks.json says 11"),
        ({"type": "essay"}, "choice: type 'essay'"),
        ({"file": "gone.jsonl"}, "gone.jsonl cannot be read"),
    ],
)
def test_a_bundle_that_is_not_as_its_table_says_is_refused(changes, message, tmp_path):
    damage(write_bundle(tmp_path), "choice", **changes)
    with pytest.raises(EvaluationError, match=message):
        read_bundle(tmp_path)


def test_a_bundle_with_a_changed_row_is_refused(tmp_path):
    file = write_bundle(tmp_path) / "choice.jsonl"
    file.write_text(re.sub(r'"gold": \d', '"gold": 3', file.read_text()))
    with pytest.raises(EvaluationError, match="sha256"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, r"bad.jsonl, row 0: gold = 2 with 2 choices"),
        ({"query": "q", "choices": ["a", "b"]}, r"gold = None"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, r"query = 3"),
    ],
)
def test_a_malformed_item_is_refused(row, message, tmp_path):
    write_task(tmp_path, "bad", "multiple_choice", [row])
    with pytest.raises(EvaluationError, match=message):
        read_bundle(tmp_path)
