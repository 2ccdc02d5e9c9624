"""Numbers survive: their token ids, and whether a checkpoint can repeat them.

Tokenization is checked exactly: a string's ids must decode to it again, and where the tokenizer is o200k they
must be the known ones. Repeating is reported and judges nothing: after three examples the checkpoint is given
each string and must write it again, greedily; the mean NLL of the right answer is the smoother signal below
that threshold. The prompt is plain text, the same for every checkpoint, whatever its tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.decoding.conversation import ENDOFTEXT, STOP_IDS, speaks_harmony
from trainer.decoding.generation import generate
from trainer.errors import EvaluationError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.scoring import Scored, score
from trainer.evaluate.suite import SuiteContext, SuiteResult

O200K_IDS: Mapping[str, tuple[int, ...]] = {
    "1 2 3 4 5": (16, 220, 17, 220, 18, 220, 19, 220, 20),
    "1234567890": (7633, 19354, 29338, 15),
    "1.2345e-10": (16, 13, 20771, 20, 68, 12, 702),
    "2025-08-05": (1323, 20, 12, 3062, 12, 2922),
    "1/3 = 0.333...": (16, 14, 18, 314, 220, 15, 13, 15517, 1008),
}
"""The strings, and the ids that o200k gives them."""

MOST_TOKENS = 64
_EXAMPLES = ("42", "3.14", "7 x 8 = 56")
_INSTRUCTION = "Repeat each input exactly.\n\n"


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of instruction, examples and `text` as the last input, ending where its copy begins.

    Encoded piece by piece: a string has the same ids as input and as output, those it has alone.
    """
    pieces = [_INSTRUCTION]
    for example in _EXAMPLES:
        pieces += ["Input:\n", example, "\nOutput:\n", example, "\n\n"]
    pieces += ["Input:\n", text, "\nOutput:\n"]
    return [tokenizer.bos, *(token for ids in tokenizer.encode_many(pieces) for token in ids)]


def copied(generated: str, text: str) -> tuple[bool, int]:
    """Whether the first line of what was generated is `text`, and how many first characters agree."""
    line = generated.split("\n", 1)[0]
    agreeing = next(
        (place for place, (a, b) in enumerate(zip(line, text, strict=False)) if a != b),
        min(len(line), len(text)),
    )
    return line == text, agreeing


def check_ids(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Ids of every string, whether they decode to it, and whether they are o200k's (None: not o200k)."""
    known = speaks_harmony(tokenizer)
    found = []
    for text, expected in O200K_IDS.items():
        ids = tokenizer.encode(text)
        found.append(
            {
                "text": text,
                "ids": ids,
                "round_trip": tokenizer.decode(ids) == text and len(ids) <= MOST_TOKENS,
                "as_o200k": tuple(ids) == expected if known else None,
            }
        )
    return found


def run(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
    """Check a checkpoint's tokenizer on numbers and lets it repeat them.

    Raises:
        EvaluationError: A prompt does not fit the model.
    """
    checks = check_ids(model.tokenizer)
    texts = [check["text"] for check in checks]
    asked = [prompt(model.tokenizer, text) for text in texts]
    room = [len(check["ids"]) + 4 for check in checks]  # a line break, and a little more than was asked for
    longest = max(map(len, asked)) + max(room)
    if longest > min(recipe.max_len, model.context):
        raise EvaluationError(
            f"{model.name} reads {min(recipe.max_len, model.context)} tokens and the numeric prompts need "
            f"{longest}; raise max_len or leave the suite out"
        )

    def compute() -> dict[str, Any]:
        made = generate(
            model.module,
            asked,
            max_new_tokens=max(room),
            stop=_stop_ids(model),
            rows=context.batching.rows,
            between=context.check_stop,
        )
        return {"items": _items(model, checks, asked, [one.ids for one in made], context)}

    identity = {
        "checkpoint": context.digests[context.object],
        "prompts": asked,
        "dtype": recipe.dtype,
        "device": model.device.type,
    }
    return summarise(context.once("numeric", identity, compute)["items"])


def _stop_ids(model: LanguageModel) -> list[int]:
    """Return what ends a document for this checkpoint; the copy itself ends with its line."""
    if speaks_harmony(model.tokenizer):
        return [*STOP_IDS, ENDOFTEXT]
    return [] if model.tokenizer.eos is None else [model.tokenizer.eos]


def _items(
    model: LanguageModel,
    checks: Sequence[Mapping[str, Any]],
    asked: Sequence[Sequence[int]],
    made: Sequence[Sequence[int]],
    context: SuiteContext,
) -> list[dict[str, Any]]:
    right = [Scored([*ids, *check["ids"]], len(ids)) for ids, check in zip(asked, checks, strict=True)]
    scores = score(model, [[one] for one in right], context.batching)
    items = []
    for check, ids, (found,) in zip(checks, made, scores, strict=True):
        text = model.tokenizer.decode(ids)
        exact, agreeing = copied(text, check["text"])
        items.append(
            {
                "task": "numeric",
                **check,
                "generated": text,
                "copied": exact,
                "characters": agreeing,
                "nll": -found.total,
                "tokens": len(found.logprobs),
            }
        )
    return items


def summarise(items: Sequence[Mapping[str, Any]]) -> SuiteResult:
    """Count, the share of characters copied before the first mistake, and mean NLL per token of the copy."""
    total = len(items)
    known = [item["as_o200k"] for item in items if item["as_o200k"] is not None]
    report: dict[str, Any] = {
        "total": total,
        "round_trip": sum(item["round_trip"] for item in items),
        "as_o200k": sum(known) if known else None,
        "copied": sum(item["copied"] for item in items),
        "characters": sum(item["characters"] for item in items) / sum(len(item["text"]) for item in items),
        "copy_nll": math.fsum(item["nll"] for item in items) / sum(item["tokens"] for item in items),
    }
    metrics = {f"numeric/{name}": value for name, value in report.items() if value is not None}
    return SuiteResult(metrics=metrics, report=report, items=items)
