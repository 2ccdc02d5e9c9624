"""What a backend keeps in memory otherwise than the reference does, for planning without torch.

Each backend says it in a literal `KEEPS` of words that are explained here, which is read without importing
the module.
"""

from functools import cache
from pathlib import Path

from trainer.contract.literals import literal_of
from trainer.contract.words import BACKENDS, words

KEEPS = {
    "attention_sums": "of attention its inputs, its result and a sum a row, no probabilities",
    "unsorted_tokens": "of the experts their first product and the order of tokens, no sorted rows",
    "captured_pass": "activations from the first step to the last, since a captured pass holds its addresses",
    "small_loss_chunks": "few logits at a time, since the model nearly fills the device",
    "low_halves": "of a bf16 weight's master weight the low half alone",
}
"""The words, each with what is kept."""


def keeps(backend: str) -> frozenset[str]:
    """Return the words of a backend.

    Args:
        backend: Name of a module of `trainer.model.backends`.

    Raises:
        ValueError: The module does not say what it keeps, or in other words.
    """
    return keeps_of(words(BACKENDS)[backend])


@cache
def keeps_of(module: Path) -> frozenset[str]:
    """Read what a backend's module assigns to `KEEPS`.

    Args:
        module: The file.

    Raises:
        ValueError: It assigns no literal of that name, or one with unknown words.
    """
    found = frozenset(literal_of(module, "KEEPS", "the tuple of what the backend keeps in memory"))
    if unknown := sorted(found - KEEPS.keys()):
        raise ValueError(f"{module}: KEEPS has {', '.join(map(repr, unknown))}; allowed: {', '.join(KEEPS)}")
    return found
