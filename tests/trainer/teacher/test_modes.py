"""Other reasoning modes against openai-harmony, which renders the same conversation with another effort."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.contract.scaffold import DEFAULT_INSTRUCTIONS, Scaffold
from trainer.decoding.conversation import END, START, conversation_prompt
from trainer.errors import TeacherError
from trainer.teacher.modes import MODES, ModeWriter
from vpmoe_assets.harmony.conversation import messages, validate
from vpmoe_assets.harmony.render import Renderer
from vpmoe_assets.harmony.truncate import KEEP

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50).filter(str.strip)
ROW = {"query": "What is 2+2?", "synthetic_reasoning": "2+2=4.", "synthetic_answer": "4", "synth_id": "0"}


@pytest.fixture(scope="module")
def renderer(ranks):
    return Renderer(ranks)


@pytest.fixture(scope="module")
def writer(o200k):
    return ModeWriter(o200k)


def scaffold(mode, identity="You are a model.", instructions=DEFAULT_INSTRUCTIONS):
    return Scaffold(model_identity=identity, reasoning_effort=mode, instructions=instructions)


@settings(max_examples=15, deadline=None)
@given(
    modes=st.tuples(st.sampled_from(MODES), st.sampled_from(MODES)),
    identity=TEXTS,
    instructions=st.none() | TEXTS,
    texts=st.tuples(TEXTS, TEXTS, TEXTS),
    spare=st.integers(0, 60),
)
def test_another_mode_is_what_harmony_renders_and_every_position_maps(
    modes, identity, instructions, texts, spare, renderer, writer
):
    row = ROW | dict(zip(("query", "synthetic_reasoning", "synthetic_answer"), texts, strict=True))
    stored_turn, other_turn = (
        validate(messages(row, scaffold(mode, identity, instructions))) for mode in modes
    )
    stored, other = renderer.encode(stored_turn), renderer.encode(other_turn)
    cut = renderer.cut(stored, stored.length - spare)  # reasoning, then the question, lose their beginning
    assume(cut.drop is None)
    if cut != KEEP:
        stored, other = renderer.shorten(stored, cut, stored_turn), renderer.shorten(other, cut, other_turn)
    here, there = renderer.concatenate([stored]), renderer.concatenate([other])
    if "Reasoning: " in identity:  # would be a second line that says a mode
        return
    assert writer.mode(here.tokens) == modes[0]
    found = writer.rewrite(here.tokens, modes[1])
    assert np.array_equal(found.tokens, there.tokens)
    at = np.flatnonzero(here.mask)
    mapped = found.positions(at)
    assert np.array_equal(mapped, np.flatnonzero(there.mask))
    assert np.array_equal(here.span[at], there.span[mapped])
    assert np.array_equal(here.tokens[at + 1], found.tokens[mapped + 1])
    assert np.array_equal(writer.rewrite(found.tokens, modes[0]).tokens, here.tokens)


def test_a_prompt_alone_is_rewritten_too(o200k, writer):
    from trainer.contract.schema.experiment import load_experiment

    table = load_experiment("smoke").data.synth_harmony
    high, low = (conversation_prompt(o200k, table, "Why?", effort=mode) for mode in ("high", "low"))
    assert writer.rewrite(high, "low").tokens.tolist() == low
    assert writer.rewrite(high, "high").tokens.tolist() == high


def golden(renderer, **changes):
    return renderer.render(messages(ROW, scaffold("high", **changes))).tokens


def test_what_has_no_mode_or_several_is_refused(o200k, renderer, writer):
    tokens = golden(renderer)
    with pytest.raises(TeacherError, match=r"begins with .*, not with a system message"):
        writer.rewrite(tokens[1:], "low")
    with pytest.raises(TeacherError, match="has no end"):
        writer.rewrite(tokens[:20], "low")
    twice = golden(renderer, identity="Reasoning: low")
    with pytest.raises(TeacherError, match="2 lines `Reasoning: …`"):
        writer.mode(twice)
    silent = [START, *o200k.encode("system"), writer._opening[-1], *o200k.encode("Hello."), END, START]
    with pytest.raises(TeacherError, match="0 lines"):
        writer.rewrite(silent, "low")
    with pytest.raises(TeacherError, match="reasoning mode 'High': allowed are low, medium, high"):
        writer.rewrite(tokens, "High")


def test_a_system_message_that_its_text_does_not_encode_to_is_refused(o200k, renderer, writer):
    tokens = golden(renderer).tolist()
    end = tokens.index(END)
    apart = [one for letter in o200k.decode(tokens[3:end]) for one in o200k.encode(letter)]
    with pytest.raises(TeacherError, match="not what its own text encodes to"):
        writer.rewrite([*tokens[:3], *apart, *tokens[end:]], "low")


def test_positions_in_the_system_message_have_no_place(renderer, writer):
    found = writer.rewrite(golden(renderer), "low")
    assert found.positions([found.first]) == found.first + found.shift
    with pytest.raises(TeacherError, match=rf"position {found.first - 1} lies in the system message"):
        found.positions([found.first - 1, 120])


def test_modes_need_harmony(llama):
    with pytest.raises(TeacherError, match="give o200k's"):
        ModeWriter(llama.model.tokenizer)
