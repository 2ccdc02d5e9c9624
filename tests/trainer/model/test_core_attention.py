import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from tests.trainer.model.model_cases import tiny
from trainer.model import core_attention
from trainer.model.config import transformer_config
from trainer.model.core_attention import ReferenceCoreAttention
from trainer.model.document_mask import Documents, document_mask
from trainer.model.gpt import ensure_parallel_state

WINDOW = 4
HEADS, GROUPS, DIM = 4, 2, 8


def build(*, local: bool, softmax_type: str = "learnable", alibi: bool = True, groups: int = GROUPS):
    ensure_parallel_state()
    arch = tiny(
        "dense",
        model={"num_layers": 1, "softmax_type": softmax_type, "num_query_groups": groups},
        attention={"window_attn_skip_freq": [int(local)], "window_size": WINDOW},
        tpa={"use_tpa": False},
        grape={"grape_a": True},
    )
    config = transformer_config(arch, alibi=alibi)
    attention = ReferenceCoreAttention(
        config=config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    if attention.softmax_offset is not None:
        torch.nn.init.normal_(attention.softmax_offset, std=1.0, generator=torch.Generator().manual_seed(3))
    return attention


def inputs(length: int, batch: int = 2, groups: int = GROUPS, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((length, batch, HEADS, DIM), (length, batch, groups, DIM), (length, batch, groups, DIM))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def naive(query, key, value, doc, *, window, slopes, sink, groups=GROUPS):
    """float64, one score at a time."""
    length, batch, heads, dim = query.shape
    out = np.zeros((length, batch, heads, dim))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(length):
                allowed = []
                for j in range(i + 1):
                    if window is not None and i - j >= window:
                        continue
                    if i != j and (doc[b, i] != doc[b, j] or doc[b, i] == -1):
                        continue
                    allowed.append(j)
                weights = []
                for j in allowed:
                    score = sum(query[i, b, h, d] * key[j, b, g, d] for d in range(dim)) / math.sqrt(dim)
                    if slopes is not None:
                        score -= slopes[h] * (i - j)
                    weights.append(math.exp(score))
                total = sum(weights) + (0.0 if sink is None else math.exp(sink[h]))
                for weight, j in zip(weights, allowed, strict=True):
                    out[i, b, h] += weight / total * value[j, b, g]
    return out.reshape(length, batch, heads * dim)


def packed(length: int, batch: int = 2) -> torch.Tensor:
    doc = torch.zeros(batch, length, dtype=torch.int64)
    doc[0, length // 3 :] = 1
    doc[1, 2 * length // 3 :] = -1
    return doc


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 19])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one", "learnable"])
def test_equals_explicit_loops(monkeypatch, length, local, softmax_type):
    monkeypatch.setattr(core_attention, "_LOCAL_QUERY_BLOCK", 1)  # 19 rows then span several blocks
    monkeypatch.setattr(core_attention, "_GLOBAL_QUERY_BLOCK", 7)
    attention = build(local=local, softmax_type=softmax_type)
    query, key, value = inputs(length)
    sink = {"vanilla": None, "off-by-one": [0.0] * HEADS}.get(
        softmax_type, None if attention.softmax_offset is None else attention.softmax_offset.tolist()
    )
    for doc in (torch.zeros(2, length, dtype=torch.int64), packed(length)):
        expected = naive(
            *(tensor.detach().double().numpy() for tensor in (query, key, value)),
            doc.numpy(),
            window=WINDOW if local else None,
            slopes=None if local else [0.25, 0.0625, 0.015625, 0.00390625],
            sink=sink,
        )
        np.testing.assert_allclose(
            attention(query, key, value, Documents(doc)).detach().numpy(), expected, rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one", "learnable"])
def test_a_row_at_a_time_without_gradients_changes_no_bit(monkeypatch, local, softmax_type):
    attention = build(local=local, softmax_type=softmax_type)
    length = 150  # two blocks of a local layer
    query, key, value = inputs(length)
    documents = Documents(packed(length))
    together = attention(query, key, value, documents)
    cached = (
        query[-70:].detach(),
        key.detach().permute(1, 2, 0, 3),
        value.detach().permute(1, 2, 0, 3),
        torch.stack([torch.arange(70)[:, None] + shift - torch.arange(length)[None] for shift in (80, 40)]),
        torch.rand(2, 70, length, generator=torch.Generator().manual_seed(5)) < 0.7,
    )
    with torch.no_grad():
        together_cached = attention.attend_cached(*cached)
        monkeypatch.setattr(core_attention, "_SCORES_AT_ONCE", 0)
        assert torch.equal(attention(query, key, value, documents), together)
        assert torch.equal(attention.attend_cached(*cached), together_cached)


@pytest.mark.parametrize("groups", [1, 4])
def test_grouping_of_heads_equals_explicit_loops(groups):
    attention = build(local=False, alibi=False, softmax_type="vanilla", groups=groups)
    query, key, value = inputs(9, groups=groups)
    doc = packed(9)
    expected = naive(
        *(tensor.detach().double().numpy() for tensor in (query, key, value)),
        doc.numpy(),
        window=None,
        slopes=None,
        sink=None,
        groups=groups,
    )
    np.testing.assert_allclose(
        attention(query, key, value, Documents(doc)).detach().numpy(), expected, rtol=2e-5, atol=2e-6
    )


def test_window_of_four_shows_the_last_four_tokens():
    attention = build(local=True, softmax_type="vanilla")
    places = torch.arange(6)
    allowed = document_mask(places, places, torch.zeros(1, 6, dtype=torch.int64), attention.window)[0]
    assert allowed[5].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert allowed[1].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("local", [True, False])
def test_block_size_changes_neither_output_nor_gradient(monkeypatch, local):
    attention = build(local=local)
    results = []
    for size in (1, 1000):
        monkeypatch.setattr(core_attention, "_LOCAL_QUERY_BLOCK", size)
        monkeypatch.setattr(core_attention, "_GLOBAL_QUERY_BLOCK", size + 4)
        tensors = inputs(23)
        attention.softmax_offset.grad = None
        out = attention(*tensors, Documents(packed(23)))
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors), attention.softmax_offset.grad.clone()])
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("local", [True, False])
def test_sink_by_log_sum_exp_equals_sink_as_a_column(local):
    attention = build(local=local)
    query, key, value = inputs(11)
    doc = packed(11)
    with_sink = attention(query, key, value, Documents(doc))

    i, j = torch.arange(11)[:, None], torch.arange(11)[None]
    scores = torch.einsum("ibgrd,jbgd->bgrij", query.unflatten(2, (GROUPS, -1)), key).flatten(1, 2) / DIM**0.5
    if attention.slopes is not None:
        scores = scores - attention.slopes[:, None, None] * (i - j)
    allowed = document_mask(i[:, 0], j[0], doc, attention.window)
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    values = value.repeat_interleave(HEADS // GROUPS, 2).permute(1, 2, 0, 3)
    # exp(l_ij) / (exp(s) + sum_k exp(l_ik)) = sigmoid(LSE_i - s) * softmax(l_i)_j: one factor of a sink-less
    # kernel's output.
    gate = torch.sigmoid(scores.logsumexp(-1) - attention.softmax_offset[None, :, None])
    gated = (scores.softmax(-1) @ values) * gate[..., None]
    torch.testing.assert_close(gated.permute(2, 0, 1, 3).flatten(2), with_sink, rtol=1e-5, atol=1e-6)


def test_learnable_sink_equals_transformers_gpt_oss():
    attention = build(local=True)
    query, key, value = inputs(10)
    doc = torch.zeros(2, 10, dtype=torch.int64)
    i, j = torch.arange(10)[:, None], torch.arange(10)[None]
    mask = torch.zeros(1, 1, 10, 10).masked_fill(~((j <= i) & (i - j < WINDOW)), float("-inf"))
    module = SimpleNamespace(
        num_key_value_groups=HEADS // GROUPS, sinks=attention.softmax_offset, training=False
    )
    expected, _ = eager_attention_forward(
        module, *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), mask, scaling=DIM**-0.5
    )
    ours = attention(query, key, value, Documents(doc))
    torch.testing.assert_close(ours, expected.transpose(0, 1).flatten(2), rtol=1e-5, atol=1e-6)


def test_off_by_one_is_a_sink_of_zero_and_not_vanilla():
    fixed, learnable, vanilla = (
        build(local=True, softmax_type=kind) for kind in ("off-by-one", "learnable", "vanilla")
    )
    torch.nn.init.zeros_(learnable.softmax_offset)
    tensors, doc = inputs(7), torch.zeros(2, 7, dtype=torch.int64)
    torch.testing.assert_close(fixed(*tensors, Documents(doc)), learnable(*tensors, Documents(doc)))
    assert (fixed(*tensors, Documents(doc)) - vanilla(*tensors, Documents(doc))).abs().max() > 1e-2


def test_softmax_runs_in_fp32_for_bf16_inputs():
    attention = build(local=False)
    tensors = [tensor.detach().bfloat16() for tensor in inputs(16)]
    doc = packed(16)
    exact = attention(*(tensor.float() for tensor in tensors), Documents(doc))
    torch.testing.assert_close(attention(*tensors, Documents(doc)), exact.bfloat16(), rtol=0, atol=0)
