"""Perplexity on held-out text and on held-out conversations, the latter apart for reasoning and answer.

Text: the first `ppl_tokens` tokens of the valid split of `healing_text_v1`, document by document. A
document longer than `max_len` is read in windows that do not overlap; documents never share a window. Every
token but a document's first is predicted once, EOD included.

Conversations: the first whole conversations of the valid split of `synth_kd_v1` with at least `ppl_tokens`
tokens together. Only the assistant's tokens count, in two means: span 1 (reasoning) and span 2 (final).

Standard errors take documents, not tokens, as independent: with loss L_d and tokens T_d of document d and the
ratio m = Σ L / Σ T, the variance of m is n / (n − 1) · Σ (L_d − m T_d)² / (Σ T)² (the linearised ratio
estimator).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.checkpoints.tokenizers import RANKS_SHA256, O200kTokenizer
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.data.indexed import SPAN_FINAL, SPAN_REASONING, SpanDocuments, manifest_value
from trainer.data.text import TextDocuments
from trainer.errors import EvaluationError, TokenizerMismatchError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.scoring import Scored, Scores, score
from trainer.evaluate.suite import SuiteContext, SuiteResult

TEXT_INPUT, CONVERSATION_INPUT = "healing_text_v1", "synth_kd_v1"
TOKENIZER_INPUT = "o200k_tokenizer"
_SPANS = {"reasoning": SPAN_REASONING, "final": SPAN_FINAL}
_LARGEST_EXPONENT = 700.0


def require_tokenizer(model: LanguageModel, manifest: dict[str, Any], context: SuiteContext) -> None:
    """Refuse token data that a checkpoint would read as other text.

    Args:
        model: The checkpoint.
        manifest: Of the data.
        context: Holds the data's tokenizer, to compare a Hugging Face checkpoint's own with.

    Raises:
        TokenizerMismatchError: The checkpoint has another tokenizer than the data.
        EvaluationError: The data have another tokenizer than this trainer knows.
    """
    found = manifest_value(manifest, "tokenizer", "model_sha256")
    if found != RANKS_SHA256:
        raise EvaluationError(
            f"the data were tokenised with ranks of sha256 {found}; only {RANKS_SHA256} (o200k) can be read"
        )
    if isinstance(model.tokenizer, O200kTokenizer):
        return
    theirs = O200kTokenizer(context.input(TOKENIZER_INPUT, "comparing a checkpoint's tokenizer"))
    if model.tokenizer.fingerprint != theirs.fingerprint:
        raise TokenizerMismatchError(
            f"the data hold o200k token ids and {model.name} has another tokenizer: a likelihood per token "
            "would be that of other text, and could not be compared with any other rung's"
        )


def text_windows(documents: TextDocuments, tokens: int, max_len: int) -> Iterator[tuple[int, list[Scored]]]:
    """Return the windows of each document up to a number of tokens in total; the last document is cut there.

    Args:
        documents: Of the valid split.
        tokens: Budget.
        max_len: Longest window in tokens that are read; one more is predicted.

    Yields:
        Document number and its windows.
    """
    left = tokens
    for number in range(len(documents)):
        if left < 2:
            return
        ids = documents[number][:left].tolist()
        left -= len(ids)
        windows = [ids[start : start + max_len + 1] for start in range(0, len(ids) - 1, max_len)]
        if windows:
            yield number, [Scored(window, 1) for window in windows]


def ratio(losses: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """Mean loss per token over documents, its standard error, and the perplexity.

    Args:
        losses: Summed loss of each document in nats.
        tokens: Scored tokens of each.

    Returns:
        `nll`, `stderr` (None for a single document), `ppl` (None where it overflows), `tokens`, `documents`.

    Raises:
        EvaluationError: There is no token.
    """
    total, n = sum(tokens), len(tokens)
    if total == 0:
        raise EvaluationError("an empty span would be scored: no token of the held-out documents is in it")
    mean = math.fsum(losses) / total
    spread = math.fsum((loss - mean * count) ** 2 for loss, count in zip(losses, tokens, strict=True))
    return {
        "nll": mean,
        "stderr": math.sqrt(n / (n - 1) * spread) / total if n > 1 else None,
        "ppl": math.exp(mean) if mean < _LARGEST_EXPONENT else None,
        "tokens": total,
        "documents": n,
    }


def _text(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> dict[str, Any]:
    documents = TextDocuments(context.input(TEXT_INPUT, "the ppl suite"), "valid")
    require_tokenizer(model, documents.manifest, context)

    def compute() -> dict[str, Any]:
        windows = list(text_windows(documents, recipe.ppl_tokens, recipe.max_len))
        sequences = [window for _, parts in windows for window in parts]
        scores = iter(_scores(model, sequences, context, TEXT_INPUT))
        items = []
        for number, parts in windows:
            loss = -math.fsum(next(scores).total for _ in parts)
            count = sum(len(part.tokens) - 1 for part in parts)
            items.append({"task": TEXT_INPUT, "document": number, "tokens": count, "nll": loss})
        return {"items": items}

    return context.once(f"ppl/{TEXT_INPUT}", _identity(model, recipe, context, TEXT_INPUT), compute)


def _scores(
    model: LanguageModel, sequences: Sequence[Scored], context: SuiteContext, label: str
) -> list[Scores]:
    with context.progress(len(sequences), label) as bar:

        def tick(rows: int) -> None:
            bar.update(rows)
            context.check_stop()

        found = score(model, [[sequence] for sequence in sequences], context.batching, tick=tick)
    return [scores for (scores,) in found]


def _conversations(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> dict[str, Any]:
    documents = SpanDocuments(context.input(CONVERSATION_INPUT, "the ppl suite"), "valid")
    require_tokenizer(model, documents.manifest, context)
    ends = documents.lengths.cumsum()
    taken = int((ends < recipe.ppl_tokens).sum()) + 1
    taken = min(taken, len(documents))
    longest = int(documents.lengths[:taken].max())
    if longest - 1 > recipe.max_len:
        raise EvaluationError(
            f"a held-out conversation has {longest} tokens and max_len = {recipe.max_len}; conversations are "
            "never cut, so raise evaluation.max_len or lower data.synth_kd_v1.seq_len"
        )

    def compute() -> dict[str, Any]:
        read = [documents[number] for number in range(taken)]
        firsts = [int(document.loss_mask.argmax()) for document in read]
        sequences = [
            Scored(document.tokens.tolist(), first + 1) for document, first in zip(read, firsts, strict=True)
        ]
        scores = _scores(model, sequences, context, CONVERSATION_INPUT)
        items = []
        for number, (document, first, found) in enumerate(zip(read, firsts, scores, strict=True)):
            item: dict[str, Any] = {"task": CONVERSATION_INPUT, "document": number}
            span = document.span[first:-1]  # label-aligned: the entry at t belongs to the token at t + 1
            for name, value in _SPANS.items():
                chosen = found.logprobs[span == value].astype(float)
                item |= {f"{name}_tokens": len(chosen), f"{name}_nll": -math.fsum(chosen)}
            items.append(item)
        return {"items": items}

    identity = _identity(model, recipe, context, CONVERSATION_INPUT)
    return context.once(f"ppl/{CONVERSATION_INPUT}", identity, compute)


def _identity(
    model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext, data: str
) -> Mapping[str, Any]:
    return {
        "checkpoint": context.digests[context.object],
        "data": context.digests[data],
        "ppl_tokens": recipe.ppl_tokens,
        "max_len": recipe.max_len,
        "dtype": recipe.dtype,
        "device": model.device.type,
    }


def run(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
    """Measure a checkpoint's perplexities.

    Raises:
        TokenizerMismatchError: The checkpoint has another tokenizer than the data.
    """
    text = _text(model, recipe, context)["items"]
    talk = _conversations(model, recipe, context)["items"]
    report: dict[str, Any] = {
        TEXT_INPUT: ratio([item["nll"] for item in text], [item["tokens"] for item in text]),
        CONVERSATION_INPUT: {
            name: ratio([item[f"{name}_nll"] for item in talk], [item[f"{name}_tokens"] for item in talk])
            for name in _SPANS
        },
    }
    found = {"text": report[TEXT_INPUT], **report[CONVERSATION_INPUT]}
    metrics: dict[str, int | float] = {}
    for name, values in found.items():
        metrics |= {f"ppl/{name}/{key}": values[key] for key in ("nll", "stderr") if values[key] is not None}
    return SuiteResult(metrics=metrics, report=report, items=[*text, *talk])
