"""SYNTH row to Harmony conversation: five messages in a fixed order, and what makes one acceptable."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import RowError

TEXT_FIELDS = ("query", "synthetic_reasoning", "synthetic_answer")
METADATA_FIELDS = (
    "synth_id",
    "language",
    "exercise",
    "model",
    "constraints",
    "seed_license",
    "query_seed_url",
)
ROLES = ("system", "developer", "user", "assistant")
ASSISTANT_CHANNELS = ("analysis", "final")


class Turn(NamedTuple):
    """A validated conversation: everything before the latest user message, and that message's turn."""

    head: Sequence[Mapping[str, Any]]
    user: str
    analysis: str
    final: str


def is_complete(row: Mapping[str, Any]) -> bool:
    """Whether the three text fields are present and not empty; other rows are skipped and counted."""
    return all(row.get(field) for field in TEXT_FIELDS)


def messages(row: Mapping[str, Any], scaffold: Scaffold) -> list[dict[str, Any]]:
    """Return the conversation of a complete SYNTH row: system, developer, user, analysis, final.

    Args:
        row: Has `query`, `synthetic_reasoning` and `synthetic_answer`.
        scaffold: What comes before the query.
    """
    query, reasoning, answer = (row[field] for field in TEXT_FIELDS)
    return [
        *scaffold.opening,
        {"role": "user", "content": [{"type": "text", "text": query}]},
        {"role": "assistant", "channel": "analysis", "content": [{"type": "text", "text": reasoning}]},
        {"role": "assistant", "channel": "final", "content": [{"type": "text", "text": answer}]},
    ]


def messages_json(row: Mapping[str, Any], scaffold: Scaffold) -> str:
    """`{"messages": […]}` in ASCII, as stored in a synth_harmony shard."""
    return json.dumps({"messages": messages(row, scaffold)})


def parse_messages(text: str | None) -> list[dict[str, Any]]:
    """Read a `messages_json` field.

    Raises:
        RowError: Absent, not JSON, not valid Unicode, or not an object with a list of messages.
    """
    import orjson

    if not text:
        raise RowError("messages_json is missing")
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(f"messages_json is not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("messages"), list):
        raise RowError('messages_json must be an object {"messages": [...]} with a list of messages')
    return document["messages"]


def validate(conversation: Sequence[Any]) -> Turn:
    """Check a conversation and split it into its head and its latest turn.

    It must end with user, assistant/analysis, assistant/final, all with text; before these may stand a system
    and a developer message and earlier turns.

    Raises:
        RowError: Anything else, with the position (from 0) of the message at fault.
    """
    if not conversation:
        raise RowError("the conversation has no messages")
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in conversation):
        raise RowError("the conversation has no assistant message")
    for position, message in enumerate(conversation):
        _check_message(position, message)
    if len(conversation) < 3:
        raise RowError(f"only {len(conversation)} messages; a turn is user, analysis, final")
    *head, user, analysis, final = conversation
    last = len(conversation) - 1
    if _kind(final) != ("assistant", "final"):
        raise RowError(f"message {last} is {_name(final)}; the last message must be assistant/final")
    if _kind(analysis) != ("assistant", "analysis"):
        raise RowError(f"message {last - 1} is {_name(analysis)}; the one before the final must be analysis")
    if _kind(user) != ("user", None):
        raise RowError(
            f"message {last - 2} is {_name(user)}; "
            "exactly one analysis, after a user message, may precede the final"
        )
    return Turn(
        head, *(_text(last - 2 + offset, message) for offset, message in enumerate((user, analysis, final)))
    )


def _kind(message: Mapping[str, Any]) -> tuple[str, str | None]:
    return message["role"], message.get("channel")


def _name(message: Mapping[str, Any]) -> str:
    role, channel = _kind(message)
    return role if channel is None else f"{role}/{channel}"


def _check_message(position: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise RowError(f"message {position} is a {type(message).__name__}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {position} has role {role!r}; allowed: {', '.join(ROLES)}")
    channel = message.get("channel")
    if role == "assistant":
        if channel not in ASSISTANT_CHANNELS:
            raise RowError(
                f"message {position} (assistant) has channel {channel!r}; allowed: analysis, final"
            )
    elif channel is not None:
        raise RowError(
            f"message {position} ({role}) has channel {channel!r}; only assistant messages have one"
        )
    for field in ("recipient", "content_type", "name"):
        if message.get(field) is not None:
            raise RowError(
                f"message {position} has {field} {message[field]!r}; tool traffic is not supported"
            )
    if role in ("user", "assistant"):
        _text(position, message)
    elif not message.get("content"):
        raise RowError(f"message {position} ({role}) has no content")


def _text(position: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        if len(content) != 1:
            raise RowError(f"message {position} has {len(content)} content parts; expected one text")
        part = content[0]
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"message {position} has content that is not text")
        content = part.get("text")
    if not isinstance(content, str):
        raise RowError(f"message {position} has no text")
    if not content:
        raise RowError(f"message {position} ({_name(message)}) is empty")
    return content
