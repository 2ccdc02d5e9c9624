"""Exact ids of numbers, and counting what was repeated."""

import json

import openai_harmony as oh
import pytest

from tests.trainer.evaluate.evaluation_inputs import context, plain_logprobs
from tests.trainer.evaluate.test_core8 import recipe as core8_recipe
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.decoding.generation import Generated
from trainer.evaluate import numeric
from vpmoe_assets.harmony.tokenizer import load_harmony


def recipe(max_len: int = 512):
    return core8_recipe(max_len=max_len).model_copy(update={"suites": ("numeric",)})


def test_the_known_ids_are_those_of_openai_harmony_and_ours(ranks):
    oracle: oh.HarmonyEncoding = load_harmony(ranks)
    for text, ids in numeric.O200K_IDS.items():
        assert tuple(oracle.encode(text)) == ids
    for check in numeric.check_ids(O200kTokenizer(ranks)):
        assert check["as_o200k"] is True
        assert check["round_trip"] is True


def test_a_damaged_tokenizer_is_found_out(ranks, monkeypatch):
    tokenizer = O200kTokenizer(ranks)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: [token for one in text for token in encode(one)])
    checks = {check["text"]: check for check in numeric.check_ids(tokenizer)}
    assert checks["1234567890"]["as_o200k"] is False
    assert checks["1234567890"]["round_trip"] is True
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text.replace("e-", "e")))
    checks = {check["text"]: check for check in numeric.check_ids(tokenizer)}
    assert checks["1.2345e-10"]["round_trip"] is False
    assert checks["1 2 3 4 5"]["round_trip"] is True


def test_another_tokenizer_is_asked_for_the_round_trip_only(llama):
    for check in numeric.check_ids(llama.tokenizer):
        assert check["as_o200k"] is None
        assert check["round_trip"] is True


@pytest.mark.parametrize("name", ["student", "llama"])
def test_a_prompt_shows_the_string_as_its_own_ids_and_reads_as_text(name, request):
    tokenizer = request.getfixturevalue(name).tokenizer
    ids = numeric.prompt(tokenizer, "2025-08-05")
    own = tokenizer.encode("2025-08-05")
    assert ids[0] == tokenizer.bos
    assert sum(ids[at : at + len(own)] == own for at in range(len(ids))) == 1
    text = tokenizer.decode(ids[1:])
    assert text.startswith("Repeat each input exactly.\n\nInput:\n42\nOutput:\n42\n\n")
    assert text.endswith("Input:\n2025-08-05\nOutput:\n")


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("1 2 3", (True, 5)),
        ("1 2 3\nInput:\n9", (True, 5)),
        ("1 2 3 ", (False, 5)),
        ("1 2", (False, 3)),
        ("1 2 4", (False, 4)),
        ("", (False, 0)),
        ("\n1 2 3", (False, 0)),
    ],
)
def test_the_first_line_must_be_the_string(generated, expected):
    assert numeric.copied(generated, "1 2 3") == expected


@pytest.mark.parametrize("name", ["student", "llama"])
def test_a_checkpoint_gives_the_same_numbers_twice_and_in_batches_of_one(name, request, tmp_path):
    model = request.getfixturevalue(name)
    one, again = (numeric.run(model, recipe(), context(tmp_path / str(n))) for n in range(2))
    single = numeric.run(model, recipe(), context(tmp_path / "single", rows=1, tokens=1))
    assert one == again
    assert one.metrics == pytest.approx(single.metrics, rel=1e-5)
    assert [item["generated"] for item in one.items] == [item["generated"] for item in single.items]
    assert one.metrics["numeric/round_trip"] == one.metrics["numeric/total"] == 5
    assert one.metrics.get("numeric/as_o200k") == (5 if name == "student" else None)
    json.dumps([dict(item) for item in one.items])


def test_the_loss_of_the_copy_is_transformers_own(llama, tmp_path):
    found = numeric.run(llama, recipe(), context(tmp_path))
    total, tokens = 0.0, 0
    for item in found.items:
        ids = numeric.prompt(llama.tokenizer, item["text"])
        logprobs, _ = plain_logprobs(llama.module, [*ids, *item["ids"]])
        assert item["nll"] == pytest.approx(-logprobs[len(ids) - 1 :].sum(), rel=1e-4)
        total, tokens = total + item["nll"], tokens + len(item["ids"])
    assert found.metrics["numeric/copy_nll"] == pytest.approx(total / tokens)


def test_copies_are_counted(student, tmp_path, monkeypatch):
    def repeat(_model, prompts, **_settings):
        texts = list(numeric.O200K_IDS)
        lines = [texts[0] + "\n", texts[1], texts[2] + "0\n", texts[3][:4], ""]
        return [Generated(tuple(student.tokenizer.encode(line)), (0.0,) * 9, "length") for line in lines]

    monkeypatch.setattr(numeric, "generate", repeat)
    found = numeric.run(student, recipe(), context(tmp_path))
    assert found.report["copied"] == 2
    lengths = [len(text) for text in numeric.O200K_IDS]
    assert found.metrics["numeric/characters"] == pytest.approx(
        (lengths[0] + lengths[1] + lengths[2] + 4) / sum(lengths)
    )


def test_a_context_that_is_too_short_is_refused(student, tmp_path):
    with pytest.raises(ValueError, match=r"reads 40 tokens and the numeric prompts need"):
        numeric.run(student, recipe(max_len=40), context(tmp_path))
