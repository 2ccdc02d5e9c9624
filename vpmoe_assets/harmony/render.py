"""Conversations to token ids, loss mask and span labels, fast.

The wire form of a message is `<|start|>role[<|channel|>channel]<|message|>content<|end|>`; a final answer
at the end closes with `<|return|>`, then comes one EOD. Only the contents change from row to row: what
stands before the latest user message is rendered once by `openai-harmony` and cached, the rest are constant
headers around what `tiktoken` makes of three texts (as ordinary text: a literal `<|end|>` in a query is
not a control token). `openai-harmony` renders the same conversations several times slower; the tests and an
asset check compare the two.

Labels: every token of an assistant message, wrapper and terminator included, has span 1 (analysis) or 2
(final) and mask 1; all else, the EOD too, has 0. Stored arrays are label-aligned, i.e. shifted by one:
position t holds the label of token t+1, which is what position t predicts.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vpmoe_assets.errors import RowError
from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.conversation import Turn, validate
from vpmoe_assets.harmony.long_words import require_quick
from vpmoe_assets.harmony.truncate import Cut, plan_cut

if TYPE_CHECKING:
    import openai_harmony

#: Part of the configuration hash; raise it when any output byte changes.
RENDERER_VERSION = "1"
SPAN_NONE, SPAN_ANALYSIS, SPAN_FINAL = 0, 1, 2

#: The labels of a conversation in order: everything up to the analysis, analysis, final, EOD.
_RUNS = np.array([SPAN_NONE, SPAN_ANALYSIS, SPAN_FINAL, SPAN_NONE], dtype=np.uint8)

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Rendered:
    """One conversation with its EOD: tokens [N] int32, mask [N] and span [N] uint8, label-aligned."""

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    span: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Head:
    """All tokens before the latest user message's content: ids [n] uint32 and their span labels [n] uint8."""

    ids: Ids
    span: npt.NDArray[np.uint8]
    has_labels: bool


class Encoded(NamedTuple):
    """A turn as ids: the head, the contents of user, analysis and final, and the whole length with EOD."""

    head: Head
    user: Ids
    analysis: Ids
    final: Ids
    length: int


class Renderer:
    """Renders conversations with the tokenizer of one directory; caches the scaffolds it meets.

    Args:
        tokenizer_dir: Holds the verified ranks file.
    """

    #: Scaffolds kept; a data set has one, and one per teacher mode at most.
    CACHED_HEADS = 64

    def __init__(self, tokenizer_dir: Path) -> None:
        self._directory = tokenizer_dir
        self._encoding = tokenizer.load_text_encoding(tokenizer_dir)
        self._encode = tokenizer.text_encoder(tokenizer_dir)
        self._heads: dict[bytes, Head] = {}
        self._latest: tuple[Sequence[Mapping[str, Any]] | None, Head] = (None, _head([], []))
        self._user_header = self._header("user")
        analysis_header, final_header = (
            self._header("assistant", "analysis"),
            self._header("assistant", "final"),
        )
        self._to_analysis = _ids(tokenizer.END, *analysis_header)
        self._to_final = _ids(tokenizer.END, *final_header)
        self._tail = _ids(tokenizer.RETURN, tokenizer.EOD)
        self._analysis_wrapper = len(analysis_header) + 1
        self._final_wrapper = len(final_header) + 1
        self._other = len(self._to_analysis) + len(self._to_final) + len(self._tail)

    # Both are asked for per conversation, and loading either verifies the ranks file once more.
    @functools.cached_property
    def continuation(self) -> npt.NDArray[np.bool_]:
        """[V] bool: tokens that start inside a UTF-8 character."""
        return tokenizer.continuation_table(self._directory)

    @functools.cached_property
    def _oracle(self) -> "openai_harmony.HarmonyEncoding":
        return tokenizer.load_harmony(self._directory)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """Render one conversation at its full length.

        Raises:
            RowError: The conversation is not acceptable.
        """
        return self.concatenate([self.encode(validate(messages))])

    def encode(self, turn: Turn) -> Encoded:
        """Token ids of a validated conversation.

        Raises:
            RowError: A text cannot be encoded, or the head cannot be rendered.
        """
        return self.encode_all([turn])[0]

    def encode_all(self, turns: Sequence[Turn]) -> list[Encoded]:
        """Token ids of many validated conversations.

        Raises:
            RowError: A text of any of them cannot be encoded, or a head cannot be rendered.
        """
        heads = [self.head(turn.head) for turn in turns]
        encode = self._encode
        try:
            # Column after column with nothing in between: the encoder's tables stay in the processor's cache.
            users = [encode(turn.user) for turn in turns]
            analyses = [encode(turn.analysis) for turn in turns]
            finals = [encode(turn.final) for turn in turns]
        except tokenizer.TextError as error:
            raise RowError(str(error)) from error
        other = self._other
        return [
            Encoded(
                head, user, analysis, final, head.ids.size + user.size + analysis.size + final.size + other
            )
            for head, user, analysis, final in zip(heads, users, analyses, finals, strict=True)
        ]

    def head(self, messages: Sequence[Mapping[str, Any]]) -> Head:
        """Everything up to and including the header of the latest user message."""
        if messages is self._latest[0]:  # rows of one source share their scaffold object
            return self._latest[1]
        import orjson

        # Only pure scaffolds recur; earlier turns would fill the cache with texts never seen again.
        key = None
        if all(message["role"] in ("system", "developer") for message in messages):
            key = orjson.dumps(messages if isinstance(messages, list) else list(messages))
            if (cached := self._heads.get(key)) is not None:
                self._latest = (messages, cached)
                return cached
        head = self._render_head(messages)
        if key is not None and len(self._heads) < self.CACHED_HEADS:
            self._heads[key] = head
            self._latest = (messages, head)
        return head

    def cut(self, encoded: Encoded, seq_len: int) -> Cut:
        """Where to cut the conversation so that it has at most `seq_len` tokens."""
        return plan_cut(
            encoded.user,
            encoded.analysis,
            final_part=encoded.final.size + self._final_wrapper + 1,
            other=encoded.length - encoded.user.size - encoded.analysis.size,
            seq_len=seq_len,
            continuation=self.continuation,
        )

    def shorten(self, encoded: Encoded, cut: Cut, original: Turn) -> Encoded:
        """Apply a cut and let `openai-harmony` confirm that the conversation is still the same.

        Raises:
            RowError: It does not parse, or roles, channels, count or final content changed.
        """
        user, analysis = encoded.user[cut.user_from :], encoded.analysis[cut.analysis_from :]
        length = encoded.length - cut.user_from - cut.analysis_from
        shorter = Encoded(encoded.head, user, analysis, encoded.final, length)
        self.require_parses(shorter, original)
        return shorter

    def concatenate(self, conversations: Sequence[Encoded]) -> Rendered:
        """Return the arrays of at least one conversation, one after the other.

        Raises:
            AssertionError: An invariant of the format is broken, i.e. a defect of this module.
        """
        to_analysis, to_final, tail = self._to_analysis, self._to_final, self._tail
        pieces: list[Ids] = []
        for head, user, analysis, final, _ in conversations:
            pieces += (head.ids, user, to_analysis, analysis, to_final, final, tail)
        tokens = np.concatenate(pieces).view(np.int32)
        lengths = np.array([conversation.length for conversation in conversations])
        # Runs of equal labels, shifted by one: the first label of a document goes, a 0 comes at its end.
        runs = np.empty((len(conversations), len(_RUNS)), dtype=np.int64)
        runs[:, 1] = [conversation.analysis.size for conversation in conversations]
        runs[:, 2] = [conversation.final.size for conversation in conversations]
        runs[:, 1] += self._analysis_wrapper
        runs[:, 2] += self._final_wrapper
        runs[:, 3] = 2
        runs[:, 0] = lengths - runs[:, 1:].sum(axis=1)
        span = np.repeat(np.tile(_RUNS, len(conversations)), runs.ravel())
        ends = np.cumsum(lengths)
        if not (
            tokens.size == span.size == ends[-1]
            and bool((tokens[ends - 1] == tokenizer.EOD).all())
            and np.count_nonzero(tokens == tokenizer.EOD) == ends.size
        ):
            raise AssertionError("arrays disagree in length, or an EOD is not exactly at a document's end")
        tokenizer.require_known_ids(tokens, "a rendered conversation")
        for conversation, end in zip(conversations, ends.tolist(), strict=True):
            head = conversation.head
            if head.has_labels:  # earlier turns
                start = end - conversation.length
                span[start : start + head.span.size - 1] = head.span[1:]
        return Rendered(tokens, (span > 0).view(np.uint8), span)

    def require_parses(self, encoded: Encoded, original: Turn) -> None:
        """Parse a cut conversation with `openai-harmony`: same messages, and a whole final answer.

        Raises:
            RowError: It does not parse, or roles, channels, count or final content changed.
        """
        import openai_harmony

        tokens = self.concatenate([encoded]).tokens[:-1].tolist()
        try:
            parsed = self._oracle.parse_messages_from_completion_tokens(tokens)
        except openai_harmony.HarmonyError as error:
            raise RowError(f"the truncated conversation does not parse ({error})") from error
        expected = [(message["role"], message.get("channel")) for message in original.head]
        expected += [("user", None), ("assistant", "analysis"), ("assistant", "final")]
        found = [(message.author.role.value, message.channel) for message in parsed]
        if found != expected:
            raise RowError(f"truncation changed the messages: {found}, expected {expected}")
        if "".join(getattr(part, "text", "") for part in parsed[-1].content) != original.final:
            raise RowError("truncation changed the final answer")

    def _header(self, role: str, channel: str | None = None) -> list[int]:
        ids = [tokenizer.START, *self._encoding.encode_ordinary(role)]
        if channel is not None:
            ids += [tokenizer.CHANNEL, *self._encoding.encode_ordinary(channel)]
        return [*ids, tokenizer.MESSAGE]

    def _render_head(self, messages: Sequence[Mapping[str, Any]]) -> Head:
        whole, parts = render_with_harmony(self._directory, messages) if messages else ([], [])
        labels = [label for label, ids in parts for _ in ids]
        return _head([*whole, *self._user_header], labels + [SPAN_NONE] * len(self._user_header))


def span_of(message: Mapping[str, Any]) -> int:
    """Return the label of all tokens of a message."""
    return {"analysis": SPAN_ANALYSIS, "final": SPAN_FINAL}.get(message.get("channel") or "", SPAN_NONE)


def render_with_harmony(
    tokenizer_dir: Path, messages: Sequence[Mapping[str, Any]], *, for_training: bool = False
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Render with `openai-harmony`, as a whole and message by message.

    Args:
        tokenizer_dir: Holds the verified ranks file.
        messages: As stored in `messages_json`.
        for_training: Close a final answer at the end with `<|return|>` instead of `<|end|>`.

    Returns:
        All ids, and per message (span label, ids), which concatenate to all ids.

    Raises:
        OracleTooSlowError: A text has words that the library takes too long for.
        RowError: The library refuses the messages, or the two renderings differ.
    """
    import openai_harmony as oh
    import pydantic

    require_quick(messages)
    oracle = tokenizer.load_harmony(tokenizer_dir)
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    try:
        parsed = [oh.Message.from_dict(dict(message)) for message in messages]
        conversation = oh.Conversation.from_messages(parsed)
        if for_training:
            whole = oracle.render_conversation_for_training(conversation, config=config)
        else:
            whole = oracle.render_conversation(conversation, config=config)
        singles = [oracle.render(message) for message in parsed]
    except (
        oh.HarmonyError,
        pydantic.ValidationError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise RowError(f"openai-harmony refuses the messages ({error})") from error
    if for_training and messages and _ends_with_final(messages):
        singles[-1][-1] = tokenizer.RETURN
    if [number for single in singles for number in single] != whole:
        raise RowError("the conversation renders differently as a whole and message by message")
    return whole, [(span_of(message), single) for message, single in zip(messages, singles, strict=True)]


def _ends_with_final(messages: Sequence[Mapping[str, Any]]) -> bool:
    return messages[-1]["role"] == "assistant" and messages[-1].get("channel") == "final"


def _head(ids: list[int], labels: list[int]) -> Head:
    return Head(_ids(*ids), np.array(labels, dtype=np.uint8), any(labels))


def _ids(*values: int) -> Ids:
    array = np.array(values, dtype=np.uint32)
    array.flags.writeable = False
    return array
