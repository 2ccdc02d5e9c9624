"""Generation against whole forward passes (our models) and against `transformers`' own generate."""

import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.trainer.model.model_cases import VOCAB, randomize, tiny
from trainer.decoding.decoder import open_decoder
from trainer.decoding.generation import generate
from trainer.decoding.sampling import Sampling
from trainer.model.gpt import build_model

PROMPTS = [[5], [7, 3, 9, 11, 2, 4, 8], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]]
SEEDS = [11, 12, 13, 14]
SAMPLED = Sampling(temperature=1.2, top_k=40, top_p=0.95)


def llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


def gpt_oss():
    """Sinks, experts, and a sliding window in every second layer."""
    torch.manual_seed(1)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=6,
            max_position_embeddings=64,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


@functools.cache
def model_of(kind: str):
    if kind in ("llama", "gpt_oss"):
        return {"llama": llama, "gpt_oss": gpt_oss}[kind]()
    return randomize(build_model(tiny(kind))).eval()


@pytest.fixture
def moe():
    return model_of("moe")


OURS, THEIRS = ["compat", "dense", "moe"], ["llama", "gpt_oss"]


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """``[S, V]`` of a whole row, without a cache."""
    tokens = torch.tensor([ids])
    if hasattr(model, "forward_hidden"):
        logits = model(tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens))
    else:
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def check_logprobs(model, prompt, made, atol=2e-4):
    whole = log_probabilities(model, [*prompt, *made.ids])[len(prompt) - 1 : -1]
    expected = whole.gather(1, torch.tensor(made.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(made.logprobs), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("kind", OURS)
def test_greedy_ids_are_the_argmax_of_the_whole_row_and_logprobs_are_its(kind):
    ours = model_of(kind)
    made = generate(ours, PROMPTS, max_new_tokens=20)
    for prompt, one in zip(PROMPTS, made, strict=True):
        assert len(one.ids) == 20
        assert one.finish == "length"
        whole = log_probabilities(ours, [*prompt, *one.ids])[len(prompt) - 1 : -1]
        assert whole.argmax(-1).tolist() == list(one.ids)
        check_logprobs(ours, prompt, one)


@pytest.mark.parametrize("kind", THEIRS)
def test_greedy_equals_transformers_generate(kind):
    theirs = model_of(kind)
    made = generate(theirs, PROMPTS, max_new_tokens=20)
    for prompt, one in zip(PROMPTS, made, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, use_cache=True)
        assert expected[0, len(prompt) :].tolist() == list(one.ids)
        check_logprobs(theirs, prompt, one)


@pytest.mark.parametrize("kind", THEIRS)
def test_stop_ids_of_transformers_generate_end_at_the_same_token(kind):
    theirs = model_of(kind)
    free = generate(theirs, PROMPTS, max_new_tokens=12)
    stop = {free[0].ids[4], free[1].ids[7]}
    made = generate(theirs, PROMPTS, max_new_tokens=12, stop=stop)
    for prompt, one in zip(PROMPTS, made, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=sorted(stop)
        )
        assert expected[0, len(prompt) :].tolist() == list(one.ids)
        assert (one.finish == "stop") == (one.ids[-1] in stop)
        assert not stop & set(one.ids[:-1])
    assert {one.finish for one in made[:2]} == {"stop"}


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_a_sequence_is_the_same_in_any_company(kind):
    model = model_of(kind)
    stop = (3, 17, 60)
    settings = {"max_new_tokens": 16, "stop": stop, "sampling": SAMPLED}
    together = generate(model, PROMPTS, seeds=SEEDS, **settings)
    backwards = generate(model, PROMPTS[::-1], seeds=SEEDS[::-1], rows=3, **settings)[::-1]
    alone = [
        generate(model, [prompt], seeds=[seed], **settings)[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert [one.ids for one in together] == [one.ids for one in backwards] == [one.ids for one in alone]
    assert [one.finish for one in together] == [one.finish for one in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4
        )
    assert len({one.ids for one in together}) == len(PROMPTS)


def test_the_same_twice_to_the_bit(moe):
    first, second = (
        generate(moe, PROMPTS, max_new_tokens=12, sampling=SAMPLED, seeds=SEEDS) for _ in range(2)
    )
    assert first == second


def test_another_seed_gives_another_sample_and_logprobs_stay_the_models(moe):
    made = generate(moe, [PROMPTS[1]] * 5, max_new_tokens=12, sampling=SAMPLED, seeds=[1, 2, 3, 1, 4])
    assert made[0].ids == made[3].ids
    assert len({one.ids for one in made}) == 4
    for one in made:  # of the model, not of the distribution at temperature 1.2 that was sampled
        check_logprobs(moe, PROMPTS[1], one)


@pytest.mark.parametrize("kind", ["moe", "llama"])
def test_equal_prompts_are_run_once(kind, monkeypatch):
    model = model_of(kind)
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[1], PROMPTS[1]]
    decoder = open_decoder(model)
    prefilled = []
    prefill = decoder.prefill

    def spy(unique, reserve):
        prefilled.extend(map(tuple, unique))
        return prefill(unique, reserve)

    monkeypatch.setattr(decoder, "prefill", spy)
    monkeypatch.setattr("trainer.decoding.generation.open_decoder", lambda _: decoder)
    made = generate(model, prompts, max_new_tokens=8, sampling=SAMPLED, seeds=[1, 2, 3, 4])
    assert sorted(prefilled) == sorted({tuple(prompt) for prompt in prompts})
    for prompt, one, seed in zip(prompts, made, [1, 2, 3, 4], strict=True):
        assert generate(model, [prompt], max_new_tokens=8, sampling=SAMPLED, seeds=[seed])[0].ids == one.ids


def test_what_is_watched_is_what_is_made_and_work_can_be_interrupted(moe):
    seen: list[tuple[int, int]] = []
    steps = []
    made = generate(
        moe,
        PROMPTS,
        max_new_tokens=6,
        watch=lambda *pair: seen.append(pair),
        between=lambda: steps.append(len(seen)),
    )
    for number, one in enumerate(made):
        assert tuple(token for place, token in seen if place == number) == one.ids
    assert steps == [0, 4, 8, 12, 16, 20]

    def stop_soon():
        if len(seen) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(moe, PROMPTS, max_new_tokens=20, watch=lambda *pair: seen.append(pair), between=stop_soon)
    assert len(seen) == 32


def test_training_mode_comes_back_and_nothing_is_counted(moe):
    moe.train()
    moe.decoder.layers[1].eval()
    try:
        generate(moe, PROMPTS[:1], max_new_tokens=2)
        assert moe.training
        assert not moe.decoder.layers[1].training
        assert moe.router_counts().sum() == 0
    finally:
        moe.eval()


def test_bf16_greedy_follows_its_own_whole_rows():
    model = randomize(build_model(tiny("dense"))).to(torch.bfloat16).eval()
    for prompt, one in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=10), strict=True):
        check_logprobs(model, prompt, one, atol=0.15)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, f"prompt 0 has id {VOCAB}"),
        ([[-1]], {}, "prompt 0 has id -1"),
        ([[1] * 60], {}, "60 tokens, which with max_new_tokens = 8 is more than the 64"),
        ([[1]], {"stop": [VOCAB]}, f"stop id {VOCAB}"),
        ([[1]], {"max_new_tokens": 0}, "must be at least 1"),
        ([[1]], {"rows": 0}, "must be at least 1"),
        ([[1]], {"sampling": Sampling(1.0)}, "sampling needs seeds"),
        ([[1], [2]], {"sampling": Sampling(1.0), "seeds": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_what_cannot_be_generated_is_refused(moe, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(moe, prompts, **({"max_new_tokens": 8} | settings))


def test_no_prompts_make_nothing_and_the_last_position_can_be_filled(moe):
    assert generate(moe, [], max_new_tokens=3) == []
    (one,) = generate(moe, [[1] * 60], max_new_tokens=4)
    assert len(one.ids) == 4


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="cannot generate with a Linear"):
        generate(torch.nn.Linear(2, 2), [[1]], max_new_tokens=1)


def test_experts_on_several_ranks_are_refused(moe, monkeypatch):
    monkeypatch.setattr(moe.pg_collection, "ep", SimpleNamespace(size=lambda: 2))
    with pytest.raises(NotImplementedError, match="experts spread over 2 ranks"):
        generate(moe, [[1]], max_new_tokens=1)
