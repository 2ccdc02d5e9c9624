"""The slow, independent way from a conversation to a training document, for checks and tests only.

`openai-harmony` renders, message by message and as a whole; truncation is done here on lists, rule by rule.
Nothing is shared with the fast renderer but the tokenizer file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.render import render_with_harmony

if TYPE_CHECKING:
    import tiktoken

Document = tuple[list[int], list[int], list[int]]


def expected_document(
    tokenizer_dir: Path, messages: Sequence[Mapping[str, Any]], seq_len: int | None = None
) -> Document | None:
    """Tokens, mask and span (label-aligned) of a conversation, None if it must be dropped.

    Args:
        tokenizer_dir: Holds the verified ranks file.
        messages: Ends with user, assistant/analysis, assistant/final.
        seq_len: Longest document, EOD included; None never truncates.

    Raises:
        OracleTooSlowError: A text has words that the library takes too long for.
        RowError: `openai-harmony` refuses the messages or contradicts itself.
    """
    _, parts = render_with_harmony(tokenizer_dir, messages, for_training=True)
    if seq_len is not None:
        cut = _truncated(tokenizer_dir, parts, seq_len)
        if cut is None:
            return None
        parts = cut
    tokens = [number for _, ids in parts for number in ids] + [tokenizer.EOD]
    span = [label for label, ids in parts for _ in ids] + [0]
    span = [*span[1:], 0]
    return tokens, [int(label > 0) for label in span], span


def _truncated(
    tokenizer_dir: Path, parts: list[tuple[int, list[int]]], seq_len: int
) -> list[tuple[int, list[int]]] | None:
    def total() -> int:
        return sum(len(ids) for _, ids in parts) + 1

    def shorten(position: int, keep: int) -> int:
        """Keep the last `keep` content tokens of a message, from a whole character on; what was kept."""
        label, ids = parts[position]
        start = ids.index(tokenizer.MESSAGE) + 1
        header, content, end = ids[:start], ids[start:-1], ids[-1:]
        content = content[len(content) - keep :]
        while content and _inside_character(encoding, content[0]):
            content = content[1:]
        parts[position] = (label, header + content + end)
        return len(content)

    def content_length(position: int) -> int:
        ids = parts[position][1]
        return len(ids) - ids.index(tokenizer.MESSAGE) - 2

    parts = list(parts)
    user, analysis, final = len(parts) - 3, len(parts) - 2, len(parts) - 1
    if total() <= seq_len:
        return parts
    if len(parts[final][1]) + 1 > seq_len:
        return None
    encoding = tokenizer.load_tiktoken(tokenizer_dir)  # verifies the file: once, not for every token
    length = content_length(analysis)
    shorten(analysis, max(0, min(length, length - (total() - seq_len))))
    if total() > seq_len:
        keep = content_length(user) - (total() - seq_len)
        if keep < 1 or shorten(user, keep) < 1:
            return None
    return parts


def _inside_character(encoding: "tiktoken.Encoding", number: int) -> bool:
    token = encoding.decode_single_token_bytes(number)
    return 0x80 <= token[0] <= 0xBF
