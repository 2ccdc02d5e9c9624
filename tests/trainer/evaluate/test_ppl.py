"""Perplexities against sums over whole documents, and the refusals of data that mean nothing."""

import json
import math

import numpy as np
import pytest
import torch

from tests.trainer.evaluate.evaluation_inputs import EOD, context, write_conversations, write_text
from tests.trainer.evaluate.test_core8 import recipe as core8_recipe
from trainer.data.indexed import SpanDocuments
from trainer.data.text import TextDocuments
from trainer.errors import EvaluationError, TokenizerMismatchError
from trainer.evaluate.ppl import ratio, require_tokenizer, run, text_windows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), [40, 7, 120, 33])


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("talk"), [60, 24, 48, 90])


def recipe(tokens: int, max_len: int = 64):
    return core8_recipe(max_len=max_len).model_copy(update={"suites": ("ppl",), "ppl_tokens": tokens})


def losses(model, ids):
    """Cross-entropy of every token but the first, from the whole logits."""
    tokens = torch.from_numpy(np.asarray(ids)).long()
    places = torch.arange(len(tokens))[None]
    with torch.no_grad():
        logits = model.module(tokens[None], places, torch.zeros_like(places))[0]
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none").double().numpy()


def test_text_counts_every_token_but_a_documents_first_once(student, text, talk, tmp_path):
    few = write_conversations(tmp_path / "few", [24])
    found = run(student, recipe(150), context(tmp_path, healing_text_v1=text, synth_kd_v1=few))
    documents = TextDocuments(text, "valid")
    ids = [documents[0], documents[1], documents[2][:103]]  # 40 + 7 + 103 tokens
    sums = [losses(student, part).sum() for part in ids[:2]]
    sums.append(losses(student, ids[2][:65]).sum() + losses(student, ids[2][64:]).sum())
    report = found.report["healing_text_v1"]
    assert report["tokens"] == 39 + 6 + 102
    assert report["documents"] == 3
    assert report["nll"] == pytest.approx(sum(sums) / 147, rel=1e-5)
    assert report["ppl"] == pytest.approx(math.exp(sum(sums) / 147), rel=1e-4)
    assert [item["nll"] for item in found.items[:3]] == pytest.approx(sums, rel=1e-5)


def test_conversations_count_reasoning_and_answer_apart(student, text, talk, tmp_path):
    found = run(student, recipe(90, max_len=100), context(tmp_path, healing_text_v1=text, synth_kd_v1=talk))
    documents = SpanDocuments(talk, "valid")
    report = found.report["synth_kd_v1"]
    for name, span in (("reasoning", 1), ("final", 2)):
        loss, tokens = 0.0, 0
        for number in range(3):  # 60 + 24 tokens are fewer than 90: the third belongs to it, the fourth not
            document = documents[number]
            every = losses(student, document.tokens)
            chosen = document.span[:-1] == span
            loss, tokens = loss + every[chosen].sum(), tokens + int(chosen.sum())
        assert report[name]["tokens"] == tokens
        assert report[name]["documents"] == 3
        assert report[name]["nll"] == pytest.approx(loss / tokens, rel=1e-5)
        assert found.metrics[f"ppl/{name}/nll"] == report[name]["nll"]


def test_batches_of_one_and_of_many_give_the_same_perplexities(student, text, talk, tmp_path):
    inputs = {"healing_text_v1": text, "synth_kd_v1": talk}
    one = run(student, recipe(200, 128), context(tmp_path / "one", rows=1, tokens=1, **inputs))
    many = run(student, recipe(200, 128), context(tmp_path / "many", **inputs))
    assert one.metrics == pytest.approx(many.metrics, rel=1e-5)
    assert run(student, recipe(200, 128), context(tmp_path / "again", **inputs)) == many


def test_documents_never_share_a_window_and_windows_follow_one_another(text):
    documents = TextDocuments(text, "valid")
    windows = dict(text_windows(documents, 10_000, 50))
    assert list(windows) == [0, 1, 2, 3]
    for number, parts in windows.items():
        ids = documents[number].tolist()
        read = [part.tokens for part in parts]
        assert all(len(tokens) <= 51 for tokens in read)
        assert [token for tokens in read for token in tokens[1:]] == ids[1:]
        assert [tokens[0] for tokens in read[1:]] == [tokens[-1] for tokens in read[:-1]]
        assert read[-1][-1] == EOD


def test_the_standard_error_is_that_of_repeated_samples():
    pick = np.random.default_rng(0)

    def sample():
        tokens = pick.integers(5, 50, size=60)
        loss = tokens * pick.normal(3.0, 0.5, size=60)
        return ratio(loss.tolist(), tokens.tolist())

    found = [sample() for _ in range(800)]
    spread = np.std([each["nll"] for each in found])
    assert np.mean([each["stderr"] for each in found]) == pytest.approx(spread, rel=0.1)


def test_a_checkpoint_with_another_tokenizer_is_refused(llama, text, talk, ranks, tmp_path):
    given = context(tmp_path, healing_text_v1=text, synth_kd_v1=talk, o200k_tokenizer=ranks)
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        run(llama, recipe(100), given)


def test_data_of_unknown_ranks_are_refused(student, text, tmp_path):
    manifest = json.loads((text / "manifest.json").read_text())
    manifest["tokenizer"]["model_sha256"] = "0" * 64
    with pytest.raises(EvaluationError, match="ranks of sha256 0000"):
        require_tokenizer(student, manifest, context(tmp_path))


def test_a_conversation_longer_than_max_len_is_refused_and_not_cut(student, text, talk, tmp_path):
    given = context(tmp_path, healing_text_v1=text, synth_kd_v1=talk)
    with pytest.raises(EvaluationError, match=r"has 90 tokens and max_len = 64"):
        run(student, recipe(1000), given)


def test_an_empty_span_is_refused():
    with pytest.raises(EvaluationError, match="empty span"):
        ratio([0.0, 0.0], [0, 0])


def test_a_perplexity_that_overflows_is_absent_and_its_loss_stays():
    assert ratio([8000.0], [10]) == {"nll": 800.0, "stderr": None, "ppl": None, "tokens": 10, "documents": 1}
