"""The scaffold's texts against openai-harmony, and its objects."""

import json

import pytest

from trainer.contract.scaffold import Scaffold
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.harmony.tokenizer import load_harmony, write_tokenizer


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    directory = tmp_path_factory.mktemp("o200k")
    write_tokenizer(directory)
    return load_harmony(directory)


@pytest.mark.parametrize(
    "scaffold",
    [
        Scaffold(),
        Scaffold(reasoning_effort="low", instructions=None),
        Scaffold("I am a test.\nTwo lines.", "medium", "2031-12-31", "1999-01", "Be short – ü."),
    ],
    ids=["default", "low, no developer", "own"],
)
def test_texts_are_those_that_openai_harmony_renders(scaffold, encoding):
    import openai_harmony

    conversation = openai_harmony.Conversation.from_json(json.dumps({"messages": scaffold.opening}))
    rendered = encoding.decode(encoding.render_conversation(conversation))
    ours = "".join(f"<|start|>{role}<|message|>{text}<|end|>" for role, text in scaffold.texts())
    assert ours == rendered


def test_it_comes_from_an_experiment_and_takes_another_effort():
    table = load_experiment("smoke").data.synth_harmony
    assert Scaffold.of(table) == Scaffold()
    assert Scaffold.of(table, effort="low").reasoning_effort == "Low"
    with pytest.raises(ValueError, match="must be low, medium or high, got 'extreme'"):
        Scaffold.of(table, effort="extreme")
