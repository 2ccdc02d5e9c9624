"""Conversations to token ids, loss mask and span labels, fast.

The wire form of a message is ``<|start|>role[<|channel|>channel]<|message|>content<|end|>``; a final answer
at the end closes with ``<|return|>``, then comes one EOD. Only the contents change from row to row: what
stands before the latest user message is rendered once by ``openai-harmony`` and cached, the rest are constant
headers around what ``tiktoken`` makes of three texts (as ordinary text: a literal ``<|end|>`` in a query is
not a control token). ``openai-harmony`` renders the same conversations several times slower; the tests and an
asset check compare the two.

Labels: every token of an assistant message, wrapper and terminator included, has span 1 (analysis) or 2
(final) and mask 1; all else, the EOD too, has 0. Stored arrays are label-aligned, i.e. shifted by one:
position t holds the label of token t+1, which is what position t predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.conversation import Turn, validate
from vpmoe_assets.harmony.errors import RowError
from vpmoe_assets.harmony.truncate import KEEP, Cut, plan_cut

#: Part of the configuration hash; raise it when any output byte changes.
RENDERER_VERSION = "1"
SPAN_NONE, SPAN_ANALYSIS, SPAN_FINAL = 0, 1, 2

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Rendered:
    """One conversation with its EOD: tokens [N] int32, mask [N] and span [N] uint8, label-aligned."""

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    span: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Head:
    """All tokens before the latest user message's content, with the runs (span, length) of their labels."""

    ids: Ids
    spans: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A turn as ids: the head, and the contents of user, analysis and final."""

    head: Head
    user: Ids
    analysis: Ids
    final: Ids


@dataclass
class Batch:
    """Conversations on their way to a shard, kept as the pieces they are made of until ``arrays``."""

    pieces: list[Ids] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def arrays(self) -> Rendered:
        """Concatenate everything added so far; document boundaries are in ``lengths``.

        Raises:
            AssertionError: an invariant of the format is broken, i.e. a defect of this module.
        """
        if not self.lengths:
            return Rendered(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.uint8))
        tokens = np.concatenate(self.pieces).view(np.int32)
        span = np.repeat(np.array(self.spans, np.uint8), self.counts)
        last = np.cumsum(self.lengths) - 1
        if not (
            tokens.size == span.size == last[-1] + 1
            and bool((tokens[last] == tokenizer.EOD).all())
            and np.count_nonzero(tokens == tokenizer.EOD) == last.size
        ):
            raise AssertionError(
                "rendered arrays disagree in length, or an EOD is not exactly at a document's end"
            )
        tokenizer.require_known_ids(tokens, "a rendered conversation")
        return Rendered(tokens, (span > 0).view(np.uint8), span)


class Renderer:
    """Renders conversations with the tokenizer of one directory; caches the scaffolds it meets.

    Args:
        tokenizer_dir: holds the verified ranks file.
    """

    #: Scaffolds kept; a data set has one, and one per teacher mode at most.
    CACHED_HEADS = 64

    def __init__(self, tokenizer_dir: Path) -> None:
        self._directory = tokenizer_dir
        self._encoding = tokenizer.load_tiktoken(tokenizer_dir)
        self._encode = self._encoding.encode_to_numpy
        self._heads: dict[bytes, Head] = {}
        self._latest: tuple[Sequence[Mapping[str, Any]] | None, Head] = (None, Head(_ids(), (), ()))
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

    @property
    def continuation(self) -> npt.NDArray[np.bool_]:
        """[V] bool: tokens that start inside a UTF-8 character."""
        return tokenizer.continuation_table(self._directory)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """Render one conversation at its full length.

        Raises:
            RowError: the conversation is not acceptable.
        """
        batch = Batch()
        self.add(batch, self.encode(validate(messages)))
        return batch.arrays()

    def encode(self, turn: Turn) -> Encoded:
        """Token ids of a validated conversation.

        Raises:
            RowError: a text cannot be encoded, or the head cannot be rendered.
        """
        head = self.head(turn.head)
        return Encoded(head, self.text(turn.user), self.text(turn.analysis), self.text(turn.final))

    def text(self, text: str) -> Ids:
        """[n] uint32 ids of ``text`` as ordinary text.

        Raises:
            RowError: the text is not valid Unicode, or the encoder gives up on it.
        """
        try:
            # Same ids as encode_ordinary, without a Python integer per token.
            return self._encode(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise RowError(f"a text is not valid Unicode ({error.reason} at {error.start})") from error
        except ValueError as error:
            raise RowError(f"a text cannot be encoded ({error})") from error

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

    def length(self, encoded: Encoded) -> int:
        """Tokens of the whole conversation, EOD included."""
        head, user, analysis, final = encoded.head, encoded.user, encoded.analysis, encoded.final
        return head.ids.size + user.size + analysis.size + final.size + self._other

    def cut(self, encoded: Encoded, seq_len: int) -> Cut:
        """Where to cut the conversation so that it has at most ``seq_len`` tokens."""
        length = self.length(encoded)
        if length <= seq_len:
            return KEEP
        return plan_cut(
            encoded.user,
            encoded.analysis,
            final_part=encoded.final.size + self._final_wrapper + 1,
            other=length - encoded.user.size - encoded.analysis.size,
            seq_len=seq_len,
            continuation=self.continuation,
        )

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append a conversation to a batch."""
        head, user, analysis, final = encoded.head, encoded.user, encoded.analysis, encoded.final
        batch.pieces += (head.ids, user, self._to_analysis, analysis, self._to_final, final, self._tail)
        prompt = user.size + 1  # its content and <|end|>; the header belongs to the head
        # The shift by one: the first label of the document goes, one more 0 comes at its end.
        batch.spans += (*head.spans, SPAN_NONE, SPAN_ANALYSIS, SPAN_FINAL, SPAN_NONE)
        batch.counts += (
            head.counts[0] - 1,
            *head.counts[1:],
            prompt,
            analysis.size + self._analysis_wrapper,
            final.size + self._final_wrapper,
            2,
        )
        batch.lengths.append(self.length(encoded))

    def require_parses(self, encoded: Encoded, original: Turn) -> None:
        """Parse a cut conversation with ``openai-harmony``: same messages, and a whole final answer.

        Raises:
            RowError: it does not parse, or roles, channels, count or final content changed.
        """
        import openai_harmony

        batch = Batch()
        self.add(batch, encoded)
        tokens = batch.arrays().tokens[:-1].tolist()
        try:
            parsed = tokenizer.load_harmony(self._directory).parse_messages_from_completion_tokens(tokens)
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
        spans = tuple(span for span, _ in parts)
        counts = tuple(len(ids) for _, ids in parts)
        return Head(_ids(*whole, *self._user_header), (*spans, SPAN_NONE), (*counts, len(self._user_header)))


def span_of(message: Mapping[str, Any]) -> int:
    """The label of all tokens of a message."""
    return {"analysis": SPAN_ANALYSIS, "final": SPAN_FINAL}.get(message.get("channel") or "", SPAN_NONE)


def render_with_harmony(
    tokenizer_dir: Path, messages: Sequence[Mapping[str, Any]], *, for_training: bool = False
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Render with ``openai-harmony``, as a whole and message by message.

    Args:
        tokenizer_dir: holds the verified ranks file.
        messages: as stored in ``messages_json``.
        for_training: close a final answer at the end with ``<|return|>`` instead of ``<|end|>``.

    Returns:
        All ids, and per message (span label, ids), which concatenate to all ids.

    Raises:
        RowError: the library refuses the messages, or the two renderings differ.
    """
    import openai_harmony as oh
    import pydantic

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


def _ids(*values: int) -> Ids:
    array = np.array(values, dtype=np.uint32)
    array.flags.writeable = False
    return array
