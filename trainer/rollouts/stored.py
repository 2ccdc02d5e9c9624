"""Prompts of stored conversations, in the reasoning mode that is asked for.

The mode is one word of the system message, `Reasoning: high`, and in o200k each mode is one token, cut off
from its neighbours by the colon before and the line break behind it. So another mode is another id in one
place, which is what rendering the message anew gives (a test holds it to that), and no tokenizer is needed:
data of another tokenizer are refused.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoints.tokenizers import RANKS_SHA256
from trainer.data.indexed import SpanDocuments, manifest_value
from trainer.decoding.conversation import END, prompt_length
from trainer.errors import DataError
from trainer.rollouts.prompts import Prompts, identity_of

MODE_IDS: Mapping[str, int] = {"low": 4465, "medium": 14093, "high": 1932}
"""The words with a space before them."""
_LINE = (30377, 289, 25)
"""`Reasoning:`, in three tokens."""


def with_mode(prompt: NDArray[np.int32], mode: str, name: str) -> NDArray[np.int32]:
    """Return a prompt in another mode [P] int32.

    Args:
        prompt: Ids of a conversation's beginning, from its system message on.
        mode: `low`, `medium` or `high`.
        name: Names the conversation in an error message.

    Raises:
        DataError: Its first message does not say exactly one mode.
    """
    end = int(np.argmax(prompt == END))
    message = prompt[:end].tolist()
    modes = set(MODE_IDS.values())
    found = [
        place
        for place in range(3, len(message))
        if message[place] in modes and tuple(message[place - 3 : place]) == _LINE
    ]
    if len(found) != 1:
        raise DataError(
            f"{name}: its system message says {len(found)} reasoning modes (`Reasoning: high`), and rollouts "
            "need one to put another in its place; build the data with a system message that has it once"
        )
    other = prompt.copy()
    other[found[0]] = MODE_IDS[mode]
    return other


def stored_prompts(documents: SpanDocuments, seed: int) -> Prompts:
    """Return the prompts of a split of `synth_kd_v1`.

    Args:
        documents: The train split.
        seed: The experiment's.

    Raises:
        DataError: The data are of another tokenizer than o200k.
    """
    found = manifest_value(documents.manifest, "tokenizer", "model_sha256")
    if found != RANKS_SHA256:
        raise DataError(
            f"the conversations were tokenised with ranks of sha256 {found}; rollouts know the control "
            f"tokens and reasoning modes of o200k ({RANKS_SHA256}) alone. Build synth_kd_v1 with "
            "o200k_tokenizer"
        )

    def prompt(number: int, mode: str) -> NDArray[np.int32]:
        document, name = documents[number], documents.describe(number)
        return with_mode(document.tokens[: prompt_length(document, name)], mode, name)

    return Prompts(len(documents), prompt, identity_of(documents.lengths_sha256, seed))
