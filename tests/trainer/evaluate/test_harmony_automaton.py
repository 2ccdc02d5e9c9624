"""The token automaton against `openai-harmony`'s parser."""

import openai_harmony as oh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.decoding.answers import Fault, HarmonyAutomaton, Validity, check_answer
from trainer.decoding.conversation import (
    ANALYSIS,
    ASSISTANT,
    CALL,
    CHANNEL,
    END,
    ENDOFTEXT,
    FINAL,
    MESSAGE,
    RETURN,
    START,
)
from vpmoe_assets.harmony.tokenizer import load_harmony, load_tiktoken

SPECIALS = [CHANNEL, START, END, MESSAGE, RETURN, CALL, ENDOFTEXT, 199_998, 200_003, 200_018, 201_087]
HEAD, MIDDLE = [CHANNEL, ANALYSIS, MESSAGE], [END, START, ASSISTANT, CHANNEL, FINAL, MESSAGE]
texts = st.text(max_size=40)
ordinary = st.lists(st.integers(0, 199_997), max_size=8)


@pytest.fixture(scope="module")
def parser(ranks):
    return load_harmony(ranks)


@pytest.fixture(scope="module")
def encoding(ranks):
    return load_tiktoken(ranks)


def answer(reasoning: list[int], final: list[int]) -> list[int]:
    return [*HEAD, *reasoning, *MIDDLE, *final, RETURN]


def accepted(parser, ids: list[int]) -> bool:
    """What the parser makes of the ids is a reasoning and a whole answer, in canonical tokens."""
    if not ids or ids[-1] != RETURN or RETURN in ids[:-1]:
        return False
    try:
        parsed = parser.parse_messages_from_completion_tokens(ids, role=oh.Role.ASSISTANT, strict=True)
    except oh.HarmonyError:
        return False
    # The parser takes control tokens inside a text, and other tokens that spell the same header.
    canonical = [token for token in ids if token >= 199_998] == [
        token for token in answer([], []) if token >= 199_998
    ]
    return (
        [(m.author.role.value, m.author.name, m.channel, m.recipient, m.content_type) for m in parsed]
        == [("assistant", None, "analysis", None, None), ("assistant", None, "final", None, None)]
        and canonical
        and ids[1] == ANALYSIS
        and ids[ids.index(START) + 1 : ids.index(START) + 4] == [ASSISTANT, CHANNEL, FINAL]
        and parsed[1].content[0].text != ""
    )


@settings(max_examples=60, deadline=None)
@given(reasoning=texts, final=texts.filter(bool))
def test_what_openai_harmony_renders_for_training_is_valid(parser, encoding, reasoning, final):
    conversation = oh.Conversation.from_messages(
        [
            oh.Message.from_role_and_content(oh.Role.ASSISTANT, reasoning).with_channel("analysis"),
            oh.Message.from_role_and_content(oh.Role.ASSISTANT, final).with_channel("final"),
        ]
    )
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    ids = parser.render_conversation_for_training(conversation, config=config)
    assert ids[:2] == [START, ASSISTANT]
    assert check_answer(ids[2:]) == Validity(None, None)
    assert ids[2:] == answer(encoding.encode_ordinary(reasoning), encoding.encode_ordinary(final))
    assert accepted(parser, ids[2:])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutations_are_judged_as_the_parser_judges_them(parser, data):
    ids = answer(data.draw(ordinary), data.draw(ordinary))
    for _ in range(data.draw(st.integers(0, 2), label="mutations")):
        place = data.draw(st.integers(0, len(ids)), label="place")
        token = data.draw(st.sampled_from([*SPECIALS, ANALYSIS, FINAL, ASSISTANT, 17]), label="token")
        kind = data.draw(st.sampled_from(["insert", "replace", "delete", "cut", "swap"]), label="kind")
        if kind == "insert":
            ids.insert(place, token)
        elif kind == "cut":
            ids = ids[:place]
        elif place < len(ids) and kind == "replace":
            ids[place] = token
        elif place < len(ids) and kind == "delete":
            del ids[place]
        elif place + 1 < len(ids) and kind == "swap":
            ids[place : place + 2] = ids[place : place + 2][::-1]
    assert check_answer(ids).valid == accepted(parser, ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, ANALYSIS, FINAL, ASSISTANT, 17, 18]), max_size=16))
def test_arbitrary_ids_are_judged_as_the_parser_judges_them(parser, ids):
    assert check_answer(ids).valid == accepted(parser, ids)


GOOD = answer([17, 10, 17], [19])


@pytest.mark.parametrize(
    ("ids", "fault", "position"),
    [
        ([], Fault.UNFINISHED_ANALYSIS, 0),
        ([17], Fault.ANALYSIS_HEADER, 0),
        ([CHANNEL, FINAL, MESSAGE, 19, RETURN], Fault.ANALYSIS_HEADER, 1),
        ([*HEAD, 17, CHANNEL], Fault.SPECIAL_IN_ANALYSIS, 4),
        ([*HEAD, 17, RETURN], Fault.SPECIAL_IN_ANALYSIS, 4),
        ([*HEAD, 17, 201_087], Fault.SPECIAL_IN_ANALYSIS, 4),
        ([*HEAD, 17, 201_088], Fault.SPECIAL_IN_ANALYSIS, 4),
        ([*HEAD, 17, CALL], Fault.SPECIAL_IN_ANALYSIS, 4),
        ([*HEAD, 17, ENDOFTEXT], Fault.END_OF_TEXT, 4),
        ([*HEAD, 17, 18], Fault.UNFINISHED_ANALYSIS, 5),
        ([*HEAD, 17, END, START, ASSISTANT, CHANNEL, ANALYSIS], Fault.FINAL_HEADER, 8),
        ([*HEAD, 17, END], Fault.UNFINISHED_FINAL, 5),
        ([*GOOD[:-1], END], Fault.SPECIAL_IN_FINAL, len(GOOD) - 1),
        (GOOD[:-1], Fault.UNFINISHED_FINAL, len(GOOD) - 1),
        (answer([17], []), Fault.EMPTY_FINAL, 10),
        ([*GOOD, 17], Fault.AFTER_RETURN, len(GOOD)),
        ([*GOOD, ENDOFTEXT], Fault.AFTER_RETURN, len(GOOD)),
        (answer([], [19]), None, None),
        (GOOD, None, None),
    ],
)
def test_the_fault_and_its_place_are_named(ids, fault, position):
    assert check_answer(ids) == Validity(fault, position)


def test_the_automaton_tells_which_message_it_reads():
    automaton, spans = HarmonyAutomaton(), []
    for token in GOOD:
        spans.append(automaton.span)
        assert automaton.feed(token) is None
    assert spans == ["analysis"] * 7 + ["final"] * 7
    assert automaton.complete
