"""What stands before the user's message in every Harmony conversation, as messages and as texts.

The data path stores the content objects and lets openai-harmony render them; the trainer writes the same
texts itself. Tests hold the texts to openai-harmony.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any, Self

from trainer.contract.schema.data import SynthHarmony

EFFORTS = ("Low", "Medium", "High")
VALID_CHANNELS = ("analysis", "commentary", "final")

DEFAULT_IDENTITY = "You are vpMoE, a large language model trained by Veer Pareek."
DEFAULT_INSTRUCTIONS = (
    "Follow the user's request. When you provide an answer, produce both:\n"
    "- reasoning in the analysis channel\n"
    "- the user-facing answer in the final channel"
)


@dataclass(frozen=True)
class Scaffold:
    """What stands before the user's message in every conversation.

    Args:
        model_identity: First line of the system message.
        reasoning_effort: Low, medium or high; stored capitalised.
        conversation_start_date: `YYYY-MM-DD`.
        knowledge_cutoff: `YYYY-MM`.
        instructions: Of the developer message; None leaves that message out.
    """

    model_identity: str = DEFAULT_IDENTITY
    reasoning_effort: str = "High"
    conversation_start_date: str = "2026-01-01"
    knowledge_cutoff: str = "2024-06"
    instructions: str | None = DEFAULT_INSTRUCTIONS

    def __post_init__(self) -> None:
        effort = self.reasoning_effort.capitalize()
        if effort not in EFFORTS:
            raise ValueError(f"reasoning_effort must be low, medium or high, got {self.reasoning_effort!r}")
        object.__setattr__(self, "reasoning_effort", effort)

    @classmethod
    def of(cls, table: SynthHarmony, *, effort: str | None = None) -> Self:
        """Return the scaffold of an experiment's `data.synth_harmony`.

        Args:
            table: The table.
            effort: Reasoning effort instead of the table's.
        """
        return cls(
            model_identity=table.model_identity,
            reasoning_effort=effort or table.reasoning_effort,
            conversation_start_date=table.conversation_start_date,
            knowledge_cutoff=table.knowledge_cutoff,
            instructions=table.instructions,
        )

    def system(self) -> dict[str, Any]:
        """Content object of the system message."""
        return {
            "type": "system_content",
            "model_identity": self.model_identity,
            "reasoning_effort": self.reasoning_effort,
            "conversation_start_date": self.conversation_start_date,
            "knowledge_cutoff": self.knowledge_cutoff,
            "channel_config": {"valid_channels": list(VALID_CHANNELS), "channel_required": True},
        }

    def developer(self) -> dict[str, Any] | None:
        """Content object of the developer message, None when it is left out."""
        if self.instructions is None:
            return None
        return {"type": "developer_content", "instructions": self.instructions}

    @functools.cached_property
    def opening(self) -> list[dict[str, Any]]:
        """The one or two messages that open every conversation; do not change them."""
        opening = [{"role": "system", "content": [self.system()]}]
        if (developer := self.developer()) is not None:
            opening.append({"role": "developer", "content": [developer]})
        return opening

    def texts(self) -> list[tuple[str, str]]:
        """Role and text of each of these messages, as openai-harmony renders them."""
        system = (
            f"{self.model_identity}\n"
            f"Knowledge cutoff: {self.knowledge_cutoff}\n"
            f"Current date: {self.conversation_start_date}\n\n"
            f"Reasoning: {self.reasoning_effort.lower()}\n\n"
            f"# Valid channels: {', '.join(VALID_CHANNELS)}. Channel must be included for every message."
        )
        found = [("system", system)]
        if self.instructions is not None:
            found.append(("developer", f"# Instructions\n\n{self.instructions}"))
        return found

    def as_dict(self) -> dict[str, str | None]:
        """Every field, for a configuration hash."""
        return asdict(self)
