"""Structured truncation by cases, against the list-based oracle, and at UTF-8 boundaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import RowError
from vpmoe_assets.harmony.conversation import messages, validate
from vpmoe_assets.harmony.oracle import expected_document
from vpmoe_assets.harmony.tokenizer import load_tiktoken
from vpmoe_assets.harmony.truncate import DROP_FINAL_TOO_LONG, DROP_NO_ROOM, KEEP, Cut, plan_cut

CONTINUATION = np.zeros(300, dtype=bool)
CONTINUATION[200:] = True
USER, ANALYSIS = np.arange(10), np.arange(20)


def plan(seq_len, *, user=USER, analysis=ANALYSIS, final_part=8, other=30):
    return plan_cut(
        user, analysis, final_part=final_part, other=other, seq_len=seq_len, continuation=CONTINUATION
    )


def test_a_conversation_that_fits_exactly_is_kept():
    assert plan(60) == KEEP


def test_analysis_is_cut_first_and_from_its_beginning():
    assert plan(59) == Cut(analysis_from=1)
    assert plan(41) == Cut(analysis_from=19)


def test_analysis_is_emptied_before_the_user_text_is_touched():
    assert plan(40) == Cut(analysis_from=20)


def test_user_text_is_cut_when_analysis_is_gone():
    assert plan(39) == Cut(user_from=1, analysis_from=20)
    assert plan(31) == Cut(user_from=9, analysis_from=20)


def test_without_room_for_one_user_token_it_is_dropped():
    assert plan(30) == Cut(drop=DROP_NO_ROOM)
    assert plan(10) == Cut(drop=DROP_NO_ROOM)


def test_a_final_part_that_does_not_fit_alone_is_dropped():
    assert plan(8).drop == DROP_NO_ROOM
    assert plan(7).drop == DROP_FINAL_TOO_LONG


def test_a_cut_never_starts_inside_a_character():
    analysis = np.array([1, 2, 201, 202, 3, 203])
    assert plan(44, analysis=analysis) == Cut(analysis_from=4)
    assert plan(41, analysis=analysis) == Cut(analysis_from=6)
    user = np.array([1, 201, 202])
    assert plan(32, user=user, analysis=analysis[:0]) == Cut(drop=DROP_NO_ROOM)
    user = np.array([1, 201, 2])
    assert plan(32, user=user, analysis=analysis[:0]) == Cut(user_from=2)


def cut_document(renderer, conversation, seq_len):
    turn = validate(conversation)
    encoded = renderer.encode(turn)
    cut = renderer.cut(encoded, seq_len)
    if cut.drop is not None:
        return None
    kept = encoded if cut == KEEP else renderer.shorten(encoded, cut, turn)
    arrays = renderer.concatenate([kept])
    return arrays.tokens.tolist(), arrays.mask.tolist(), arrays.span.tolist()


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.text("😀👩\u200d🏳️你好é\n <|end|>", min_size=1, max_size=60),
)


@given(query=TEXT, reasoning=TEXT, answer=TEXT, short_by=st.integers(-2, 160))
@settings(max_examples=150, deadline=None)
def test_every_cut_equals_the_oracles(renderer, tokenizer_dir, query, reasoning, answer, short_by):
    row = {"query": query, "synthetic_reasoning": reasoning, "synthetic_answer": answer}
    conversation = messages(row, Scaffold())
    whole = expected_document(tokenizer_dir, conversation)
    seq_len = max(1, len(whole[0]) - short_by)
    found = cut_document(renderer, conversation, seq_len)
    assert found == expected_document(tokenizer_dir, conversation, seq_len)
    if found is not None:
        assert len(found[0]) <= seq_len


def test_multi_byte_characters_stay_whole_at_every_length(renderer, tokenizer_dir):
    encoding = load_tiktoken(tokenizer_dir)
    row = {"query": "🏳️‍🌈𝔘𝔫𝔦𓂀" * 3, "synthetic_reasoning": "👩‍👩‍👧‍👦漢字𓀀" * 4, "synthetic_answer": "ok"}
    conversation = messages(row, Scaffold())
    length = len(expected_document(tokenizer_dir, conversation)[0])
    lengths = set()
    for seq_len in range(length - 90, length + 1):
        document = cut_document(renderer, conversation, seq_len)
        assert document == expected_document(tokenizer_dir, conversation, seq_len)
        if document is None:
            continue
        encoding.decode_bytes(document[0]).decode("utf-8", errors="strict")
        lengths.add(seq_len - len(document[0]))
    assert 0 in lengths
    assert len(lengths) > 1, "no boundary inside a character was met"


def test_earlier_turns_are_never_cut(renderer, tokenizer_dir):
    earlier = [
        {"role": "user", "content": "first " * 20},
        {"role": "assistant", "channel": "analysis", "content": "old thoughts"},
        {"role": "assistant", "channel": "final", "content": "old answer"},
    ]
    latest = messages(
        {"query": "second " * 10, "synthetic_reasoning": "new " * 30, "synthetic_answer": "yes"}, Scaffold()
    )
    conversation = [*latest[:2], *earlier, *latest[2:]]
    length = len(expected_document(tokenizer_dir, conversation)[0])
    for short_by in (0, 5, 31, 35, 41, 42, 60):
        found = cut_document(renderer, conversation, length - short_by)
        assert found == expected_document(tokenizer_dir, conversation, length - short_by)
        assert (found is None) == (short_by > 31 + 10)


def test_a_cut_that_changed_the_conversation_would_be_refused(renderer):
    conversation = messages(
        {"query": "q", "synthetic_reasoning": "a b c", "synthetic_answer": "d e"}, Scaffold()
    )
    turn = validate(conversation)
    encoded = renderer.encode(turn)
    renderer.require_parses(encoded, turn)
    shorter = encoded._replace(final=encoded.final[1:], length=encoded.length - 1)
    broken = encoded._replace(analysis=np.array([200_007, 200_006], np.uint32))
    broken = broken._replace(length=encoded.length - encoded.analysis.size + 2)
    with pytest.raises(RowError, match="changed the final answer"):
        renderer.require_parses(shorter, turn)
    with pytest.raises(RowError, match=r"does not parse|changed the messages"):
        renderer.require_parses(broken, turn)
