import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import RowError
from vpmoe_assets.harmony.conversation import is_complete, messages, messages_json, parse_messages, validate

ROW = {"query": "Why?", "synthetic_reasoning": "Hm.", "synthetic_answer": "So."}


def user(text="q"):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def assistant(channel, text="a"):
    return {"role": "assistant", "channel": channel, "content": [{"type": "text", "text": text}]}


def test_five_messages_with_the_default_scaffold():
    conversation = messages(ROW, Scaffold())
    assert [(message["role"], message.get("channel")) for message in conversation] == [
        ("system", None),
        ("developer", None),
        ("user", None),
        ("assistant", "analysis"),
        ("assistant", "final"),
    ]
    assert conversation[0]["content"] == [
        {
            "type": "system_content",
            "model_identity": "You are vpMoE, a large language model trained by Veer Pareek.",
            "reasoning_effort": "High",
            "conversation_start_date": "2026-01-01",
            "knowledge_cutoff": "2024-06",
            "channel_config": {
                "valid_channels": ["analysis", "commentary", "final"],
                "channel_required": True,
            },
        }
    ]
    assert conversation[1]["content"][0]["instructions"].startswith("Follow the user's request.")


def test_the_developer_message_can_be_left_out_and_effort_is_capitalised():
    scaffold = Scaffold(reasoning_effort="medium", instructions=None)
    conversation = messages(ROW, scaffold)
    assert [message["role"] for message in conversation] == ["system", "user", "assistant", "assistant"]
    assert conversation[0]["content"][0]["reasoning_effort"] == "Medium"
    with pytest.raises(ValueError, match="low, medium or high, got 'extreme'"):
        Scaffold(reasoning_effort="extreme")


@pytest.mark.parametrize("field", list(ROW))
@pytest.mark.parametrize("value", [None, ""])
def test_rows_without_a_text_are_incomplete(field, value):
    assert is_complete(ROW)
    assert not is_complete({**ROW, field: value})
    assert not is_complete({name: text for name, text in ROW.items() if name != field})


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_stored_json_is_ascii_and_gives_the_texts_back(text):
    row = {**ROW, "query": text, "synthetic_answer": text}
    stored = messages_json(row, Scaffold())
    assert stored.isascii()
    turn = validate(parse_messages(stored))
    assert (turn.user, turn.analysis, turn.final) == (text, "Hm.", text)
    assert turn.head == Scaffold().opening


def test_earlier_turns_and_plain_string_contents_are_accepted():
    turns = [user("1"), assistant("analysis", "2"), assistant("final", "3")]
    turn = validate(
        [*turns, {"role": "user", "content": "4"}, assistant("analysis", "5"), assistant("final", "6")]
    )
    assert (turn.user, turn.analysis, turn.final) == ("4", "5", "6")
    assert list(turn.head) == turns


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "no messages"),
        ([user()], "no assistant message"),
        (["text"], "no assistant message"),
        ([7, assistant("final")], "message 0 is a int"),
        ([{"role": "tool", "content": "x"}, assistant("final")], "message 0 has role 'tool'"),
        ([{"content": "x"}, assistant("final")], "message 0 has role None"),
        ([user(), assistant("commentary"), assistant("final")], "message 1 .* channel 'commentary'"),
        ([user(), assistant(None), assistant("final")], "message 1 .* channel None"),
        (
            [{**user(), "channel": "final"}, assistant("analysis"), assistant("final")],
            "only assistant messages",
        ),
        ([user(), assistant("analysis")], "only 2 messages"),
        ([user(), assistant("final"), assistant("analysis")], "last message must be assistant/final"),
        ([user(), assistant("analysis"), assistant("final"), user()], "message 3 is user; the last"),
        (
            [user(), user(), assistant("final")],
            "message 1 is user; the one before the final must be analysis",
        ),
        ([user(), assistant("analysis"), assistant("analysis"), assistant("final")], "exactly one analysis"),
        ([assistant("analysis"), assistant("analysis"), assistant("final")], "exactly one analysis"),
        ([user(""), assistant("analysis"), assistant("final")], "message 0 .* is empty"),
        ([user(), assistant("analysis", ""), assistant("final")], "message 1 .* is empty"),
        ([user(), assistant("analysis"), assistant("final", "")], "message 2 .* is empty"),
        ([{"role": "user"}, assistant("analysis"), assistant("final")], "message 0 has no text"),
        ([{"role": "user", "content": []}, assistant("analysis"), assistant("final")], "0 content parts"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, assistant("analysis"), assistant("final")],
            "content that is not text",
        ),
        ([{"role": "system"}, user(), assistant("analysis"), assistant("final")], "message 0 .* no content"),
        (
            [user(), assistant("analysis"), {**assistant("final"), "recipient": "browser"}],
            "recipient 'browser'; tool traffic",
        ),
    ],
)
def test_wrong_conversations_are_refused_with_the_message_at_fault(conversation, reason):
    with pytest.raises(RowError, match=reason):
        validate(conversation)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "missing"),
        ("", "missing"),
        ("{", "not valid JSON"),
        ('{"messages": [}', "not valid JSON"),
        ('{"messages": NaN}', "not valid JSON"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "not valid JSON"),
        ("[]", "list of messages"),
        ('{"messages": {}}', "list of messages"),
        ('{"message": []}', "list of messages"),
    ],
)
def test_bad_json_is_refused(text, reason):
    with pytest.raises(RowError, match=reason):
        parse_messages(text)


def test_stored_json_has_one_key():
    assert list(json.loads(messages_json(ROW, Scaffold()))) == ["messages"]
