"""Prompts of held-out conversations, rates of valid answers, and prompts made from a scaffold."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.evaluate.evaluation_inputs import _manifest, _write_pair, context
from tests.trainer.evaluate.test_core8 import recipe as core8_recipe
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.scaffold import Scaffold
from trainer.contract.schema.data import SynthHarmony
from trainer.contract.schema.evaluate import Generation
from trainer.contract.schema.experiment import load_experiment
from trainer.data.indexed import SpanDocuments
from trainer.decoding.conversation import ASSISTANT, CHANNEL, RETURN, START, conversation_prompt
from trainer.decoding.generation import Generated
from trainer.errors import DataError, EvaluationError, TokenizerMismatchError
from trainer.evaluate import harmony
from vpmoe_assets.harmony.conversation import messages
from vpmoe_assets.harmony.render import Renderer, render_with_harmony

ROWS = [
    {
        "query": f"Question {n} <|end|>?",
        "synthetic_reasoning": "Because." * (n + 1),
        "synthetic_answer": f"{n}",
    }
    for n in range(5)
]


@pytest.fixture(scope="module")
def talk(tmp_path_factory, ranks) -> Path:
    """Conversations as the data path renders them."""
    root = tmp_path_factory.mktemp("talk")
    renderer = Renderer(ranks)
    rendered = [renderer.render(messages(row, Scaffold())) for row in ROWS]
    for kind, attribute in (("tokens", "tokens"), ("lossmask", "mask"), ("span", "span")):
        arrays = [np.array(getattr(one, attribute)) for one in rendered]
        _write_pair(root / "valid" / f"shard_00_{kind}", arrays, arrays[0].dtype.type)
    shard = {"name": "shard_00", "rows": len(ROWS), "tokens": sum(one.tokens.size for one in rendered)}
    splits = {"valid": {"shards": [shard]}}
    (root / "manifest.json").write_text(json.dumps(_manifest("synth_kd_v1", splits=splits)))
    return root


def recipe(prompts: int = 3, new: int = 6, greedy: bool = True, max_len: int = 512):
    asked = Generation(prompts=prompts, max_new_tokens=new, greedy=greedy)
    return core8_recipe(max_len=max_len).model_copy(update={"suites": ("harmony",), "generation": asked})


def expected_prompt(ranks, row) -> list[int]:
    """By openai-harmony: everything before the answer, and the beginning of the answer."""
    whole, _ = render_with_harmony(ranks, messages(row, Scaffold())[:-2])
    return [*whole, START, ASSISTANT]


def test_prompts_end_where_the_answer_begins(talk, ranks):
    found = harmony.prompts(SpanDocuments(talk, "valid"), 5, 1000)
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert [ids for _, ids in found] == [expected_prompt(ranks, row) for row in ROWS]


def test_too_few_prompts_are_refused(talk):
    documents = SpanDocuments(talk, "valid")
    with pytest.raises(EvaluationError, match=r"prompts = 6, but only 5 of the 5"):
        harmony.prompts(documents, 6, 1000)
    with pytest.raises(EvaluationError, match=r"only 0 of the 5 .* at most 20 tokens"):
        harmony.prompts(documents, 1, 20)


def test_documents_that_do_not_begin_an_answer_are_refused(tmp_path):
    from tests.trainer.evaluate.evaluation_inputs import write_conversations

    documents = SpanDocuments(write_conversations(tmp_path, [40]), "valid")
    with pytest.raises(DataError, match="the first supervised tokens"):
        harmony.prompts(documents, 1, 100)


def test_a_checkpoint_is_judged_the_same_twice_and_in_any_batch(student, talk, tmp_path):
    for greedy in (True, False):
        one, again, single = (
            harmony.run(
                student,
                recipe(greedy=greedy),
                context(tmp_path / f"{greedy}{n}", rows=rows, synth_kd_v1=talk),
            )
            for n, rows in enumerate((32, 32, 1))
        )
        assert one == again
        assert [item["text"] for item in one.items] == [item["text"] for item in single.items]
        assert [item["fault"] for item in one.items] == ["analysis_header"] * 3  # random weights
        assert one.metrics == {"harmony/valid_rate": 0.0, "harmony/stderr": 0.0}
        assert one.report["faults"] == {"analysis_header": 3}
        assert all(item["tokens"] == 6 for item in one.items)
        json.dumps([dict(item) for item in one.items])


def test_sampled_answers_depend_on_the_seed_of_the_experiment(student, talk, tmp_path):
    from dataclasses import replace

    given_ = context(tmp_path / "a", synth_kd_v1=talk)
    one = harmony.run(student, recipe(greedy=False), given_)
    other = harmony.run(student, recipe(greedy=False), replace(given_, seed=1))
    assert [item["text"] for item in one.items] != [item["text"] for item in other.items]


def test_rate_error_and_faults_of_known_answers(student, talk, tmp_path, monkeypatch):
    documents = SpanDocuments(talk, "valid")
    answers = []
    for number, (_, prompt) in enumerate(harmony.prompts(documents, 5, 1000)):
        right = documents[number].tokens[len(prompt) : -1].tolist()
        assert right[0] == CHANNEL
        assert right[-1] == RETURN
        answers.append(right if number != 2 else right[:-1])
    asked = {}

    def known(_model, prompts, **settings):
        asked.update(settings)
        return [Generated(tuple(ids), (-0.5,) * len(ids), "stop") for ids in answers]

    monkeypatch.setattr(harmony, "generate", known)
    found = harmony.run(student, recipe(prompts=5), context(tmp_path, synth_kd_v1=talk))
    assert found.report["valid"] == 4
    assert found.metrics["harmony/valid_rate"] == 0.8
    assert found.metrics["harmony/stderr"] == pytest.approx((0.8 * 0.2 / 4) ** 0.5)
    assert found.report["faults"] == {"unfinished_final": 1}
    assert [item["valid"] for item in found.items] == [True, True, False, True, True]
    assert found.items[0]["mean_logprob"] == -0.5
    assert set(asked["stop"]) == {200_002, 200_012, 199_999}
    assert "Because." in found.items[0]["text"]


def test_a_finished_suite_is_not_run_again(student, talk, tmp_path, monkeypatch):
    first = harmony.run(student, recipe(), context(tmp_path, synth_kd_v1=talk))
    monkeypatch.setattr(harmony, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert harmony.run(student, recipe(), context(tmp_path, synth_kd_v1=talk)) == first
    with pytest.raises(pytest.fail.Exception):
        harmony.run(student, recipe(new=5), context(tmp_path, synth_kd_v1=talk))


def test_a_checkpoint_with_another_tokenizer_is_refused(llama, talk, ranks, tmp_path):
    with pytest.raises(TokenizerMismatchError):
        harmony.run(llama, recipe(), context(tmp_path, synth_kd_v1=talk, o200k_tokenizer=ranks))


def test_a_stop_is_heard_between_steps(student, talk, tmp_path):
    from trainer.job.lifecycle import Interrupted

    given_ = context(tmp_path, synth_kd_v1=talk)
    given_.stop.received = "SIGINT"
    with pytest.raises(Interrupted):
        harmony.run(student, recipe(), given_)


line = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    identity=line,
    instructions=st.none() | line,
    query=line,
    effort=st.sampled_from(["Low", "Medium", "High"]),
)
def test_prompts_from_a_scaffold_are_openai_harmonys(ranks, identity, instructions, query, effort):
    given_ = {
        "model_identity": identity,
        "reasoning_effort": effort,
        "conversation_start_date": "2026-01-01",
        "knowledge_cutoff": "2024-06",
        "instructions": instructions,
    }
    row = {"query": query, "synthetic_reasoning": "r", "synthetic_answer": "a"}
    whole, _ = render_with_harmony(ranks, messages(row, Scaffold(**given_))[:-2])
    found = conversation_prompt(O200kTokenizer(ranks), SynthHarmony(num_shards=1, **given_), query)
    assert found == [*whole, START, ASSISTANT]


def test_the_effort_can_be_another_than_the_scaffolds(ranks):
    tokenizer, scaffold = O200kTokenizer(ranks), load_experiment("smoke").data.synth_harmony
    text = tokenizer.decode(conversation_prompt(tokenizer, scaffold, "Hi", effort="medium"))
    assert "Reasoning: medium" in text
    assert "Reasoning: high" in tokenizer.decode(conversation_prompt(tokenizer, scaffold, "Hi"))


def test_a_tokenizer_without_control_tokens_knows_no_conversations(llama):
    with pytest.raises(EvaluationError, match="no Harmony control tokens"):
        conversation_prompt(llama.tokenizer, load_experiment("smoke").data.synth_harmony, "Hi")
