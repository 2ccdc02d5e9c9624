"""Prompts of stored conversations against what openai-harmony renders."""

import numpy as np
import pytest

from tests.trainer.evaluate.evaluation_inputs import write_ranks
from tests.trainer.train.train_jobs import write_conversations
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.schema.data import SynthHarmony
from trainer.contract.schema.experiment import load_experiment
from trainer.data.indexed import SpanDocuments
from trainer.decoding.conversation import conversation_prompt
from trainer.errors import DataError
from trainer.rollouts.curriculum import MODES
from trainer.rollouts.stored import stored_prompts, with_mode


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """A prompt as the trainer's own text of it encodes, which other tests hold to openai-harmony."""
    tokenizer = O200kTokenizer(write_ranks(tmp_path_factory.mktemp("ranks")))
    scaffold: SynthHarmony = load_experiment("smoke").data.synth_harmony

    def rendered(query, mode):
        return np.array(conversation_prompt(tokenizer, scaffold, query, effort=mode), dtype=np.int32)

    return rendered


@pytest.mark.parametrize("mode", MODES)
def test_another_mode_is_what_rendering_anew_gives(render, mode):
    for stored in MODES:
        for query in ("What is 2+2?", "Reasoning: low\n\nReasoning: high", "  высокий\n"):
            prompt = render(query, stored)
            assert np.array_equal(with_mode(prompt, mode, "it"), render(query, mode))


def test_a_message_without_its_one_mode_is_refused(render):
    prompt = render("What is 2+2?", "high")
    with pytest.raises(DataError, match="says 2 reasoning modes"):
        with_mode(np.concatenate((prompt[: np.argmax(prompt == 200007)], prompt)), "low", "it")
    with pytest.raises(DataError, match="says 0 reasoning modes"):
        with_mode(prompt[np.argmax(prompt == 200007) + 1 :], "low", "it")


def test_data_of_another_tokenizer_are_refused(tmp_path):
    root = write_conversations(tmp_path, rows=4, valid=2)
    with pytest.raises(DataError, match=r"sha256 0+; .* Build synth_kd_v1 with o200k_tokenizer"):
        stored_prompts(SpanDocuments(root, "train"), 1)
