"""Kinds of samples that a training run mixes: what the data bring and an objective weighs."""

from typing import Final

CONVERSATIONS: Final = "conversations"
TEXT: Final = "text"
SCORED: Final = "scored"
"""Conversations that a teacher has scored; the stored records ride in the batch."""
ROLLOUTS: Final = "rollouts"
"""Conversations that the student wrote and a teacher scored, while it trains."""
