"""A packed row equals its documents run alone: outputs and gradients, in every kind of layer and model."""

import pytest
import torch

from tests.trainer.model.model_cases import VOCAB, randomize, rows, tiny
from trainer.model.gpt import build_model

ONE_LAYER = {
    "local tensor-product layers": {"attention": {"window_attn_skip_freq": [1, 1]}},
    "local dense-projection layers": {
        "attention": {"window_attn_skip_freq": [1, 1]},
        "tpa": {"use_tpa": False},
    },
    "global layers": {"attention": {"window_attn_skip_freq": [0, 0]}},
}
MODELS = {
    **{
        f"{name}, {softmax} softmax": tiny(
            "dense",
            **{**tables, "model": {"num_layers": 2, "softmax_type": softmax}},
        )
        for name, tables in ONE_LAYER.items()
        for softmax in ("vanilla", "off-by-one", "learnable")
    },
    "compat": tiny("compat"),
    "dense": tiny("dense"),
    "moe": tiny("moe"),
}
DOCUMENTS = [7, 1, 5]


def run(model, batch, weights):
    """Logits of the real tokens, and gradients of their weighted sum."""
    model.zero_grad()
    documents = batch[2]
    logits = model(*batch)[documents >= 0]
    (logits * weights).sum().backward()
    model.pop_aux_loss()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_documents(name):
    model = randomize(build_model(MODELS[name]))
    packed = rows([DOCUMENTS], width=17)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(sum(DOCUMENTS), VOCAB, generator=generator)
    logits, gradients = run(model, packed, weights)

    start, apart, summed = 0, [], {}
    for length in DOCUMENTS:
        tokens = packed[0][:, start : start + length]
        alone = (tokens, torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64))
        out, grads = run(model, alone, weights[start : start + length])
        apart.append(out)
        summed = {key: summed.get(key, 0) + grad for key, grad in grads.items()}
        start += length
    torch.testing.assert_close(logits, torch.cat(apart), rtol=1e-4, atol=1e-4)
    for key, expected in summed.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[key], expected, rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=key)


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
def test_what_padding_holds_changes_nothing(kind):
    model = randomize(build_model(tiny(kind)))
    tokens, positions, documents = rows([[6, 4], [9]], width=14)
    other = torch.where(documents < 0, 77, tokens)
    first, second = model(tokens, positions, documents), model(other, positions, documents)
    assert torch.equal(first[documents >= 0], second[documents >= 0])
    assert first.isfinite().all()


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
def test_rows_of_a_batch_do_not_see_each_other(kind):
    model = randomize(build_model(tiny(kind))).eval()
    batch = rows([[6, 4], [9]], width=10)
    together = model(*batch)
    for row in range(2):
        alone = model(*(tensor[row : row + 1] for tensor in batch))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
def test_no_token_sees_a_later_one(kind):
    model = randomize(build_model(tiny(kind))).eval()
    tokens, positions, documents = rows([[12]])
    before = model(tokens, positions, documents)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % VOCAB
    after = model(changed, positions, documents)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_every_row_needs_its_documents_and_positions():
    model = build_model(tiny("dense"))
    tokens, positions, documents = rows([[8]])
    with pytest.raises(ValueError, match="doc_id: expected an int64 tensor"):
        model(tokens, positions, None)
    with pytest.raises(ValueError, match=r"doc_id: expected the shape of tokens, \[1, 8\], found \[1, 7\]"):
        model(tokens, positions, documents[:, :7])
    with pytest.raises(ValueError, match="position_ids: expected an int64 tensor"):
        model(tokens, positions.float(), documents)


def test_a_row_longer_than_the_model_allows_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens, but attention\.max_sequence_length = 64"):
        build_model(tiny("dense"))(*rows([[65]]))
