"""Harmony conversations as token ids: what a model is shown before it answers.

The wire form of a message is `<|start|>role[<|channel|>channel]<|message|>content<|end|>`. A prompt is the
messages so far and the beginning of the answer, `<|start|>assistant`; texts are encoded as ordinary text,
so that a control token's name in a query is no control token.
"""

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.scaffold import Scaffold
from trainer.contract.schema.data import SynthHarmony
from trainer.data.indexed import SpanDocument
from trainer.errors import DataError, EvaluationError

ENDOFTEXT, RETURN, CHANNEL, START, END, MESSAGE, CALL = (
    199999,
    200002,
    200005,
    200006,
    200007,
    200008,
    200012,
)
ASSISTANT, ANALYSIS, FINAL = 173781, 35644, 17196
"""The words of these names, one token each."""
FIRST_SPECIAL = 199998
"""Ids from here on are special or reserved; text encodes to smaller ones only."""
STOP_IDS = (RETURN, CALL)

_NAMES = {
    "<|return|>": RETURN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has Harmony's control tokens at their ids."""
    return all(tokenizer.special.get(name) == number for name, number in _NAMES.items())


def conversation_prompt(
    tokenizer: Tokenizer, scaffold: SynthHarmony, query: str, *, effort: str | None = None
) -> list[int]:
    """System message, developer message where there are instructions, query, `<|start|>assistant`, as ids.

    Args:
        tokenizer: With Harmony's control tokens.
        scaffold: The experiment's `data.synth_harmony`.
        query: The user's message.
        effort: Reasoning effort, instead of the scaffold's.

    Raises:
        EvaluationError: The tokenizer has no such tokens.
    """
    if not speaks_harmony(tokenizer):
        raise EvaluationError(
            "the checkpoint's tokenizer has no Harmony control tokens, so it knows no conversations; give it "
            "a plain prompt"
        )
    ids: list[int] = []
    for role, content in [*Scaffold.of(scaffold, effort=effort).texts(), ("user", query)]:
        ids += [START, *tokenizer.encode(role), MESSAGE, *tokenizer.encode(content), END]
    return [*ids, START, ASSISTANT]


def prompt_length(document: SpanDocument, name: str) -> int:
    """Tokens of a stored conversation up to the beginning of its answer, `<|start|>assistant`.

    Args:
        document: The conversation; its first supervised tokens begin the answer.
        name: Names it in an error message.

    Raises:
        DataError: It does not begin an answer where its labels say.
    """
    first = int(document.loss_mask.argmax()) + 1  # labels are one place ahead
    opening = document.tokens[first : first + 2].tolist()
    if opening != [START, ASSISTANT]:
        raise DataError(
            f"{name}: the first supervised tokens are {opening}, expected {[START, ASSISTANT]} "
            "(<|start|>assistant); build the data set again"
        )
    return first + 2
