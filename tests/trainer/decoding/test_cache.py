"""Decoding with a cache against running whole rows without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.model_cases import VOCAB, randomize, tiny
from trainer.decoding.cache import DecodingCache, extend, next_logits
from trainer.model.gpt import build_model

KINDS = {
    "compat": tiny("compat"),
    "dense": tiny("dense"),
    "moe": tiny("moe"),
    "all-global": tiny(
        "dense", attention={"window_size": 0}, tpa={"use_tpa": False}, grape={"grape_a": True}
    ),
    "all-local": tiny("dense", attention={"window_attn_skip_freq": [1, 1, 1, 1]}),
    "off-by-one": tiny("dense", model={"softmax_type": "off-by-one"}),
    "no-value-residual": tiny("dense", model={"value_residual": False}),
    "dense-qkv": tiny("dense", tpa={"use_tpa": False}),
}
WINDOW = 4


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(kind: str, dtype=torch.float32):
        if (kind, dtype) not in built:
            model = randomize(build_model(KINDS[kind], dtype=torch.float32)).to(dtype).eval()
            built[kind, dtype] = model
        return built[kind, dtype]

    return get


def sequences(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def uncached(model, row: torch.Tensor) -> torch.Tensor:
    """Logits ``[S, V]`` of one row run whole."""
    tokens = row[None]
    return model(tokens, torch.arange(len(row))[None], torch.zeros_like(tokens))[0]


def padded(parts: list[torch.Tensor], fill: int = 7) -> torch.Tensor:
    width = max(map(len, parts))
    return torch.stack([torch.nn.functional.pad(part, (0, width - len(part)), value=fill) for part in parts])


def decode(model, rows: list[torch.Tensor], cuts: list[list[int]]) -> list[list[torch.Tensor]]:
    """Feed each row in the chunks that ``cuts`` gives; logits after each chunk of each row."""
    cache = DecodingCache(len(rows))
    given, found = [0] * len(rows), [[] for _ in rows]
    for counts in zip(*cuts, strict=True):
        parts = [row[at : at + count] for row, at, count in zip(rows, given, counts, strict=True)]
        logits = next_logits(model, cache, padded(parts), counts)
        for row, count in enumerate(counts):
            given[row] += count
            found[row].append(logits[row])
    assert list(cache.lengths) == given
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_give_the_logits_of_the_whole_row_for_prompts_of_different_lengths(models, kind):
    model = models(kind)
    prompts, steps = (
        [1, 3, WINDOW, WINDOW + 1, 11],
        2 * WINDOW + 1,
    )  # shorter, equal and longer than the window
    rows = sequences([prompt + steps for prompt in prompts])
    found = decode(model, rows, [[prompt] + [1] * steps for prompt in prompts])
    for row, prompt, logits in zip(rows, prompts, found, strict=True):
        expected = uncached(model, row)[prompt - 1 :]
        torch.testing.assert_close(torch.stack(logits), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_way_to_cut_the_rows_into_passes_gives_the_same_logits(models, kind, data):
    model = models(kind)
    passes = data.draw(st.integers(1, 4), label="passes")
    cuts = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=passes, max_size=passes), min_size=1, max_size=3),
        label="chunk lengths",
    )
    rows = sequences([sum(cut) for cut in cuts], seed=data.draw(st.integers(0, 99)))
    found = decode(model, rows, cuts)
    for row, cut, logits in zip(rows, cuts, found, strict=True):
        ends = torch.tensor(cut).cumsum(0) - 1
        torch.testing.assert_close(torch.stack(logits), uncached(model, row)[ends], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
def test_bf16_with_a_cache_is_as_close_to_fp32_as_without(models, kind):
    exact, model = models(kind), models(kind, torch.bfloat16)
    assert model.head_weight.dtype == torch.bfloat16
    prompts, steps = [2, 9], 10
    rows = sequences([prompt + steps for prompt in prompts], seed=3)
    found = decode(model, rows, [[prompt] + [1] * steps for prompt in prompts])
    for row, prompt, logits in zip(rows, prompts, found, strict=True):
        truth, plain = uncached(exact, row)[prompt - 1 :], uncached(model, row)[prompt - 1 :]
        assert plain.dtype == torch.bfloat16
        cached = torch.stack(logits)
        rounding = (plain.float() - truth).norm() / truth.norm()
        assert rounding > 1e-4, "the comparison needs a model that bf16 rounds"
        assert (cached.float() - truth).norm() / truth.norm() < 1.25 * rounding + 1e-3
        assert (cached.float() - plain.float()).norm() / truth.norm() < 1.25 * rounding


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_all_hidden_states_of_a_later_pass_are_those_of_the_whole_row(models, kind):
    model = models(kind)
    first, second = [6, 2], [5, 9]
    rows = sequences([a + b for a, b in zip(first, second, strict=True)], seed=8)
    cache = DecodingCache(2)
    extend(model, cache, padded([row[:a] for row, a in zip(rows, first, strict=True)]), first)
    later = extend(model, cache, padded([row[a:] for row, a in zip(rows, first, strict=True)]), second)
    for number, row in enumerate(rows):
        with torch.no_grad():
            whole = model.forward_hidden(row[None], torch.arange(len(row))[None], torch.zeros_like(row[None]))
        found = later[: second[number], number]
        torch.testing.assert_close(found, whole[first[number] :, 0], rtol=2e-5, atol=2e-5)


def test_rows_can_be_dropped_reordered_and_repeated(models):
    model = models("moe")
    rows = sequences([9, 12, 7], seed=5)
    tails = sequences([6, 6, 6, 6], seed=6)
    cache = DecodingCache(3)
    next_logits(model, cache, padded(rows), [len(row) for row in rows])
    chosen = [2, 0, 0, 2]
    cache.select(chosen)
    assert cache.lengths == (7, 9, 9, 7)
    for step in range(6):
        logits = next_logits(model, cache, torch.stack([tail[step : step + 1] for tail in tails]))
        for number, source in enumerate(chosen):
            whole = torch.cat((rows[source], tails[number][: step + 1]))
            torch.testing.assert_close(logits[number], uncached(model, whole)[-1], rtol=2e-5, atol=2e-5)


def test_a_row_is_not_disturbed_by_the_rows_beside_it(models):
    model = models("dense")
    rows = sequences([5, 30], seed=1)
    alone = decode(model, rows[:1], [[3, 1, 1]])
    beside = decode(model, rows, [[3, 1, 1], [20, 1, 9]])
    torch.testing.assert_close(torch.stack(alone[0]), torch.stack(beside[0]), rtol=1e-5, atol=1e-5)


def test_local_layers_hold_the_window_and_no_more(models):
    model = models("all-local")
    cache = DecodingCache(1)
    next_logits(model, cache, padded(sequences([30])))
    config = model.config
    per_position = 2 * config.num_query_groups * config.kv_channels * 4
    assert cache.nbytes == config.num_layers * WINDOW * per_position
    for _ in range(5):
        next_logits(model, cache, torch.tensor([[3]]))
    assert cache.nbytes == config.num_layers * WINDOW * per_position


def test_reserved_room_is_not_grown(models):
    model = models("compat")
    cache = DecodingCache(1, reserve=20)
    next_logits(model, cache, padded(sequences([4])))
    before = cache.nbytes
    for _ in range(16):
        next_logits(model, cache, torch.tensor([[3]]))
    assert cache.nbytes == before
    next_logits(model, cache, torch.tensor([[3]]))
    assert cache.nbytes > before


def test_decoding_counts_nothing_and_asks_for_no_gradient():
    model = build_model(KINDS["moe"]).train()
    cache = DecodingCache(1)
    logits = next_logits(model, cache, torch.tensor([[1, 2, 3]]))
    assert not logits.requires_grad
    assert model.router_counts().sum() == 0
    assert model.pop_aux_loss() == 0


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), [3], "for each of the cache's 2 rows"),
        (torch.ones(2, 3, dtype=torch.int64), [3, 0], "expected one number from 1 to 3"),
        (torch.ones(2, 3, dtype=torch.int64), [3, 4], "expected one number from 1 to 3"),
        (torch.ones(2, 0, dtype=torch.int64), None, "n ≥ 1"),
        (torch.ones(2, 65, dtype=torch.int64), None, "max_sequence_length = 64"),
        (torch.ones(2, 3, dtype=torch.int32), None, "expected an int64 tensor"),
    ],
)
def test_what_does_not_fit_is_refused(models, tokens, counts, message):
    with pytest.raises(ValueError, match=message):
        next_logits(models("dense"), DecodingCache(2), tokens, counts)


def test_a_row_may_fill_the_model_and_not_one_token_more(models):
    model = models("dense")
    cache = DecodingCache(1)
    row = sequences([64])[0]
    next_logits(model, cache, row[None, :-1])
    torch.testing.assert_close(
        next_logits(model, cache, row[None, -1:])[0], uncached(model, row)[-1], rtol=2e-5, atol=2e-5
    )
    with pytest.raises(ValueError, match="row 0 would have 65 tokens"):
        next_logits(model, cache, torch.tensor([[1]]))


def test_a_cache_that_failed_half_way_is_refused(models, monkeypatch):
    model = models("dense")
    cache = DecodingCache(1)
    next_logits(model, cache, torch.tensor([[1, 2, 3]]))
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.layers[2].mlp, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next_logits(model, cache, torch.tensor([[4]]))
    with pytest.raises(RuntimeError, match="failed half-way"):
        next_logits(model, cache, torch.tensor([[4]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing was decoded on one")
@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
def test_decoding_on_cuda_gives_the_logits_of_the_whole_row_on_a_cpu(models, kind):
    model = randomize(build_model(KINDS[kind])).cuda().eval()
    rows = [row.cuda() for row in sequences([12, 20])]
    found = decode(model, rows, [[3] + [1] * 9, [11] + [1] * 9])
    for row, prompt, logits in zip(rows, [3, 11], found, strict=True):
        expected = uncached(models(kind), row.cpu())[prompt - 1 :]
        torch.testing.assert_close(torch.stack(logits).cpu(), expected, rtol=1e-3, atol=1e-3)
