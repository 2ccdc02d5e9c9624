"""The rate at which a checkpoint answers in the format of Harmony, see `trainer.decoding.answers`."""

import hashlib
import math
from collections import Counter
from typing import Any

from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.data.indexed import SpanDocuments
from trainer.decoding.answers import Fault, check_answer
from trainer.decoding.conversation import ENDOFTEXT, STOP_IDS, prompt_length
from trainer.decoding.generation import generate
from trainer.decoding.sampling import GREEDY, Sampling
from trainer.errors import EvaluationError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.ppl import CONVERSATION_INPUT, require_tokenizer
from trainer.evaluate.suite import SuiteContext, SuiteResult


def prompts(documents: SpanDocuments, count: int, longest: int) -> list[tuple[int, list[int]]]:
    """Return the first conversations of a split that are short enough, each up to `<|start|>assistant`.

    Args:
        documents: The held-out split.
        count: How many.
        longest: Most tokens of a prompt.

    Returns:
        Document numbers and ids.

    Raises:
        EvaluationError: There are not so many.
        DataError: A document does not begin an answer where its labels say.
    """
    found: list[tuple[int, list[int]]] = []
    for number in range(len(documents)):
        if len(found) == count:
            break
        document = documents[number]
        ids = document.tokens[: prompt_length(document, documents.describe(number))].tolist()
        if len(ids) <= longest:
            found.append((number, ids))
    if len(found) < count:
        raise EvaluationError(
            f"evaluation.generation.prompts = {count}, but only {len(found)} of the {len(documents)} "
            f"held-out conversations have a prompt of at most {longest} tokens (max_len - max_new_tokens); "
            "ask for fewer, or for shorter answers"
        )
    return found


def _seed(seed: int, document: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"harmony {seed} {document}".encode(), digest_size=8).digest(), "big"
    )


def run(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
    """Let a checkpoint answer the pinned prompts and judge the format of its answers.

    The prompts are those of the first held-out conversations, so they are the same for every checkpoint.

    Raises:
        TokenizerMismatchError: The checkpoint's tokenizer is not that of the conversations.
        EvaluationError: There are not enough prompts.
    """
    documents = SpanDocuments(context.input(CONVERSATION_INPUT, "the harmony suite"), "valid")
    require_tokenizer(model, documents.manifest, context)
    asked = recipe.generation
    chosen = prompts(documents, asked.prompts, recipe.max_len - asked.max_new_tokens)
    sampling = GREEDY if asked.greedy else Sampling(temperature=1.0)

    def compute() -> dict[str, Any]:
        with context.progress(len(chosen) * asked.max_new_tokens, "harmony", unit="token") as bar:

            def tick(*_: int) -> None:
                bar.update()

            made = generate(
                model.module,
                [ids for _, ids in chosen],
                max_new_tokens=asked.max_new_tokens,
                stop=(*STOP_IDS, ENDOFTEXT),
                sampling=sampling,
                seeds=[_seed(context.seed, number) for number, _ in chosen],
                rows=context.batching.rows,
                watch=tick,
                between=context.check_stop,
            )
        items = []
        for (number, prompt), answer in zip(chosen, made, strict=True):
            verdict = check_answer(answer.ids)
            items.append(
                {
                    "task": "harmony",
                    "document": number,
                    "prompt_tokens": len(prompt),
                    "tokens": len(answer.ids),
                    "finish": answer.finish,
                    "valid": verdict.valid,
                    "fault": None if verdict.fault is None else str(verdict.fault),
                    "position": verdict.position,
                    "mean_logprob": math.fsum(answer.logprobs) / len(answer.logprobs),
                    "text": model.tokenizer.decode(answer.ids),
                }
            )
        return {"items": items}

    identity = {
        "checkpoint": context.digests[context.object],
        "data": context.digests[CONVERSATION_INPUT],
        "generation": asked.model_dump(),
        "max_len": recipe.max_len,
        "dtype": recipe.dtype,
        "device": model.device.type,
        "seed": context.seed,
    }
    items = context.once("harmony", identity, compute)["items"]
    return summarise(items, max_new_tokens=asked.max_new_tokens, greedy=asked.greedy)


def summarise(items: list[dict[str, Any]], *, max_new_tokens: int, greedy: bool) -> SuiteResult:
    """Rate of valid answers with its standard error, and how often each fault occurred."""
    total, valid = len(items), sum(item["valid"] for item in items)
    rate = valid / total
    error = math.sqrt(rate * (1 - rate) / (total - 1)) if total > 1 else None
    faults = Counter(item["fault"] for item in items if not item["valid"])
    metrics: dict[str, int | float] = {"harmony/valid_rate": rate}
    if error is not None:
        metrics["harmony/stderr"] = error
    report = {
        "valid": valid,
        "total": total,
        "valid_rate": rate,
        "stderr": error,
        "faults": {fault.value: faults[fault] for fault in Fault if faults[fault]},
        "max_new_tokens": max_new_tokens,
        "greedy": greedy,
    }
    return SuiteResult(metrics=metrics, report=report, items=items)
