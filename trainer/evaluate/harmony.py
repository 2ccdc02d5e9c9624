"""Format of generated conversations: a token automaton, and the rate at which a checkpoint satisfies it.

After a prompt's `<|start|>assistant` an answer must read, id by id,

    <|channel|> analysis <|message|> text <|end|>
    <|start|> assistant <|channel|> final <|message|> text <|return|>

where text is any number of ordinary ids: no special or reserved one. The reasoning may be empty, as it is in
training conversations that were cut to fit; an answer may not. Nothing follows `<|return|>`.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.data.indexed import SpanDocuments
from trainer.decoding.conversation import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    ENDOFTEXT,
    FINAL,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
    STOP_IDS,
)
from trainer.decoding.generation import generate
from trainer.decoding.sampling import GREEDY, Sampling
from trainer.errors import EvaluationError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.ppl import CONVERSATION_INPUT, require_tokenizer
from trainer.evaluate.suite import SuiteContext, SuiteResult

_HEADERS = ((CHANNEL, ANALYSIS, MESSAGE), (START, ASSISTANT, CHANNEL, FINAL, MESSAGE))
_TERMINATORS = (END, RETURN)
_PARTS = ("analysis", "final")


class Fault(StrEnum):
    """Why an answer is not valid."""

    ANALYSIS_HEADER = "analysis_header"
    FINAL_HEADER = "final_header"
    SPECIAL_IN_ANALYSIS = "special_in_analysis"
    SPECIAL_IN_FINAL = "special_in_final"
    EMPTY_FINAL = "empty_final"
    END_OF_TEXT = "end_of_text"
    UNFINISHED_ANALYSIS = "unfinished_analysis"
    UNFINISHED_FINAL = "unfinished_final"
    AFTER_RETURN = "after_return"


@dataclass(frozen=True)
class Validity:
    """Verdict on one answer.

    Attributes:
        fault: None for a valid one.
        position: Index of the offending id; the number of ids where something is missing at the end; None for
            a valid answer.
    """

    fault: Fault | None
    position: int | None

    @property
    def valid(self) -> bool:
        """Whether the answer has the required form."""
        return self.fault is None


class HarmonyAutomaton:
    """Reads an answer id by id.

    Attributes:
        complete: Whether the answer ended as it must.
        span: `analysis` or `final`: the message that is being read.
    """

    def __init__(self) -> None:
        self._part = 0
        self._header = 0  # ids of this message's header read so far
        self._text = 0
        self.complete = False

    @property
    def span(self) -> str:
        """The message that is being read."""
        return _PARTS[self._part]

    def feed(self, token: int) -> Fault | None:
        """Read one id; after a fault the automaton is of no more use."""
        if self.complete:
            return Fault.AFTER_RETURN
        if token == ENDOFTEXT:
            return Fault.END_OF_TEXT
        header = _HEADERS[self._part]
        if self._header < len(header):
            if token != header[self._header]:
                return (Fault.ANALYSIS_HEADER, Fault.FINAL_HEADER)[self._part]
            self._header += 1
        elif 0 <= token < FIRST_SPECIAL:
            self._text += 1
        elif token != _TERMINATORS[self._part]:
            return (Fault.SPECIAL_IN_ANALYSIS, Fault.SPECIAL_IN_FINAL)[self._part]
        elif self._part == 0:
            self._part, self._header, self._text = 1, 0, 0
        elif not self._text:
            return Fault.EMPTY_FINAL
        else:
            self.complete = True
        return None

    @property
    def unfinished(self) -> Fault | None:
        """The fault of ending here; None where the answer is complete."""
        if self.complete:
            return None
        return (Fault.UNFINISHED_ANALYSIS, Fault.UNFINISHED_FINAL)[self._part]


def check_answer(ids: Iterable[int]) -> Validity:
    """Judge a generated answer.

    Args:
        ids: What followed the prompt's `<|start|>assistant`, stop id included.
    """
    automaton, position = HarmonyAutomaton(), 0
    for token in ids:
        if (fault := automaton.feed(token)) is not None:
            return Validity(fault, position)
        position += 1
    fault = automaton.unfinished
    return Validity(fault, None if fault is None else position)


def prompts(documents: SpanDocuments, count: int, longest: int) -> list[tuple[int, list[int]]]:
    """Return the first conversations of a split that are short enough, each up to `<|start|>assistant`.

    Args:
        documents: The held-out split.
        count: How many.
        longest: Most tokens of a prompt.

    Returns:
        Document numbers and ids.

    Raises:
        EvaluationError: There are not so many, or a document does not begin an answer where its labels say.
    """
    found: list[tuple[int, list[int]]] = []
    for number in range(len(documents)):
        if len(found) == count:
            break
        document = documents[number]
        first = int(document.loss_mask.argmax()) + 1  # labels are one place ahead
        ids = document.tokens[: first + 2].tolist()
        if ids[first:] != [START, ASSISTANT]:
            raise EvaluationError(
                f"{documents.describe(number)}: the first supervised tokens are {ids[first:]}, expected "
                f"{[START, ASSISTANT]} (<|start|>assistant)"
            )
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
