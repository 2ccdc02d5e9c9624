"""The fast renderer against golden values, openai-harmony and, where they are present, real rows."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harmony.inputs import HARD_TEXTS, rows
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import RowError
from vpmoe_assets.harmony.conversation import messages
from vpmoe_assets.harmony.oracle import expected_document
from vpmoe_assets.harmony.render import render_with_harmony
from vpmoe_assets.harmony.tokenizer import load_harmony

GOLDEN_ROW = {"query": "What is 2+2?", "synthetic_reasoning": "2+2=4.", "synthetic_answer": "4"}
GOLDEN_TAIL = (
    "200006 1428 200008 4827 382 220 17 10 17 30 200007 "
    "200006 173781 200005 35644 200008 17 10 17 28 19 13 200007 "
    "200006 173781 200005 17196 200008 19 200002 199999"
)


def document(rendered):
    return rendered.tokens.tolist(), rendered.mask.tolist(), rendered.span.tolist()


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_golden_conversation(renderer):
    rendered = renderer.render(messages(GOLDEN_ROW, Scaffold()))
    assert rendered.tokens.dtype == np.int32
    assert rendered.mask.dtype == rendered.span.dtype == np.uint8
    assert rendered.tokens.size == 132 == 64 + 37 + 11 + 12 + 7 + 1
    ids = ",".join(map(str, rendered.tokens.tolist()))
    assert (
        hashlib.sha256(ids.encode()).hexdigest()
        == "a537696a3710a9e78497b0cd726f78a2ea6457e02725faed83f36da1f6de71eb"
    )
    assert rendered.tokens[101:].tolist() == [int(number) for number in GOLDEN_TAIL.split()]
    assert np.flatnonzero(rendered.mask).tolist() == list(range(111, 130))
    assert rendered.span[111:130].tolist() == [1] * 12 + [2] * 7


@pytest.mark.shared
def test_every_real_row_has_the_recorded_bytes(shared_dir, renderer):
    path = shared_dir / "synth_rows_250.parquet"
    if not path.is_file():
        pytest.skip(f"{path} not found: real rows were not checked")
    table = pq.read_table(path).to_pylist()
    assert len(table) == 250
    for row in table:
        rendered = renderer.render(messages(row, Scaffold()))
        assert rendered.tokens.size == row["n_tokens"], row["synth_id"]
        assert sha256(rendered.tokens) == row["tokens_sha256"], row["synth_id"]
        assert sha256(rendered.mask) == row["lossmask_sha256"], row["synth_id"]
        assert sha256(rendered.span) == row["span_sha256"], row["synth_id"]


@pytest.mark.shared
def test_every_real_row_equals_the_oracles(shared_dir, renderer, tokenizer_dir):
    path = shared_dir / "synth_rows_250.parquet"
    if not path.is_file():
        pytest.skip(f"{path} not found: real rows were not checked")
    for row in pq.read_table(path).to_pylist():
        conversation = messages(row, Scaffold())
        assert document(renderer.render(conversation)) == expected_document(tokenizer_dir, conversation)


def test_every_generated_row_equals_the_oracles(renderer, tokenizer_dir):
    for row in rows(120):
        conversation = messages(row, Scaffold())
        assert document(renderer.render(conversation)) == expected_document(tokenizer_dir, conversation)


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(HARD_TEXTS),
    st.lists(st.sampled_from(["<|end|>", "<|return|>", "\n", " ", "ß", "😀", "中", "word"]), min_size=1).map(
        "".join
    ),
)


@given(query=TEXT, reasoning=TEXT, answer=TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_equals_the_oracles(renderer, tokenizer_dir, query, reasoning, answer):
    row = {"query": query, "synthetic_reasoning": reasoning, "synthetic_answer": answer}
    conversation = messages(row, Scaffold())
    found = document(renderer.render(conversation))
    assert found == expected_document(tokenizer_dir, conversation)
    tokens = found[0]
    assert tokens.count(199_999) == 1
    assert tokens.count(200_002) == 1
    assert tokens.count(200_007) == 4
    parsed = load_harmony(tokenizer_dir).parse_messages_from_completion_tokens(tokens[:-1])
    assert [message.content[0].text for message in parsed[2:]] == [query, reasoning, answer]


@pytest.mark.parametrize(
    "scaffold",
    [
        Scaffold(reasoning_effort="Low"),
        Scaffold(instructions=None),
        Scaffold(model_identity="Ein Modell.", instructions="Antworte kurz: <|end|>"),
        Scaffold(conversation_start_date="2027-12-31", knowledge_cutoff="2025-01"),
    ],
)
def test_other_scaffolds_equal_the_oracles(renderer, tokenizer_dir, scaffold):
    for row in rows(5):
        conversation = messages(row, scaffold)
        assert document(renderer.render(conversation)) == expected_document(tokenizer_dir, conversation)


def test_earlier_turns_are_rendered_and_supervised(renderer, tokenizer_dir):
    conversation = [
        *messages(GOLDEN_ROW, Scaffold()),
        {"role": "user", "content": "And 3+3?"},
        {"role": "assistant", "channel": "analysis", "content": "3+3=6."},
        {"role": "assistant", "channel": "final", "content": "6"},
    ]
    found = document(renderer.render(conversation))
    assert found == expected_document(tokenizer_dir, conversation)
    assert sum(found[1]) == 2 * 19
    assert found[0].count(200_002) == 1


def test_a_conversation_without_scaffold_is_rendered(renderer, tokenizer_dir):
    conversation = messages(GOLDEN_ROW, Scaffold())[2:]
    assert document(renderer.render(conversation)) == expected_document(tokenizer_dir, conversation)


def test_invalid_unicode_is_refused(renderer):
    with pytest.raises(RowError, match="not valid Unicode"):
        renderer.render(messages({**GOLDEN_ROW, "query": "broken \ud800 surrogate"}, Scaffold()))


def test_a_scaffold_that_openai_harmony_refuses_is_refused(renderer):
    head = {"role": "system", "content": [{"type": "system_content", "reasoning_effort": "Extreme"}]}
    with pytest.raises(RowError, match="openai-harmony refuses"):
        renderer.render([head, *messages(GOLDEN_ROW, Scaffold())[2:]])


def test_the_oracle_renders_whole_and_in_parts(tokenizer_dir):
    whole, parts = render_with_harmony(tokenizer_dir, messages(GOLDEN_ROW, Scaffold()), for_training=True)
    assert [len(ids) for _, ids in parts] == [64, 37, 11, 12, 7]
    assert [label for label, _ in parts] == [0, 0, 0, 1, 2]
    assert sum(len(ids) for _, ids in parts) == len(whole) == 131


def test_a_developer_message_that_openai_harmony_takes_minutes_for_is_refused_at_once(renderer):
    row = {"query": "q", "synthetic_reasoning": "r", "synthetic_answer": "a"}
    with pytest.raises(RowError, match=r"takes minutes for words as long as some here \(50000 bytes\)"):
        renderer.render(messages(row, Scaffold(instructions="Say " + "a" * 50_000)))
    texts = {**row, "query": "a" * 50_000}  # of these tiktoken alone makes ids
    assert renderer.render(messages(texts, Scaffold())).tokens.size > 6000
