import math

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.model.gpt import build_model
from trainer.model.init import initialize
from trainer.model.positions import alibi_slopes, cos_sin, initial_log_freq, rotate


def test_initial_log_frequencies_have_their_golden_values():
    small = initial_log_freq(128, 10000.0, 16.0)
    assert small[:3].tolist() == pytest.approx([0.0, -2.302585, -4.605170], abs=1e-6)
    assert small[63].item() == pytest.approx(-145.062861, abs=1e-4)
    large = initial_log_freq(128, 1e6, 16.0)
    assert large[1].item() == pytest.approx(-3.453878, abs=1e-6)
    assert large[63].item() == pytest.approx(-217.594291, abs=1e-4)


@pytest.mark.parametrize("kind", ["dense", "compat"])
def test_initial_rotation_equals_transformers_rope(kind):
    """GRAPE-M at its initial frequencies, and the donor's RoPE, against Qwen3's own implementation."""
    model = build_model(tiny(kind, grape={"rotary_base": 1e6}))
    config = Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e6
    )
    positions = torch.tensor([[0, 1, 2, 500, 2047], [7, 0, 3, 1, 1000]])
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    cos, sin = Qwen3RotaryEmbedding(config)(query, positions)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    rotation = model.rotary_pos_emb(positions)
    for tensor, wanted in zip((query, key), expected, strict=True):
        ours = rotate(tensor.permute(2, 0, 1, 3), rotation).permute(1, 2, 0, 3)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-4)  # t · f at t = 2047 in fp32


def test_scores_depend_on_distance_only():
    frequency = torch.exp(initial_log_freq(8, 1e4, 16.0) / 16.0)
    query, key = torch.randn(6, 1, 1, 8), torch.randn(6, 1, 1, 8)

    def scores(offset: int) -> torch.Tensor:
        rotation = cos_sin(torch.arange(6)[None] + offset, frequency)
        return torch.einsum("ibhd,jbhd->ij", rotate(query, rotation), rotate(key, rotation))

    torch.testing.assert_close(scores(0), scores(40), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "compat", "moe"])
def test_a_position_offset_leaves_the_logits_alone(kind):
    model = randomize(build_model(tiny(kind))).eval()
    tokens, positions, documents = rows([[12, 6]])
    shifted = positions + torch.where(documents == 1, 9, 0)
    torch.testing.assert_close(
        model(tokens, positions, documents), model(tokens, shifted, documents), rtol=1e-4, atol=1e-4
    )


def test_gradient_reaches_every_frequency_unless_frozen():
    batch = rows([[12]])
    model = randomize(build_model(tiny("dense")))
    model(*batch).square().sum().backward()
    assert (model.rotary_pos_emb.log_freq.grad != 0).all()

    frozen = build_model(tiny("dense", grape={"grapem_learnable_freq": False}))
    assert not frozen.rotary_pos_emb.log_freq.requires_grad
    frozen(*batch).square().sum().backward()
    assert frozen.rotary_pos_emb.log_freq.grad is None


def test_scale_leaves_the_rotation_alone_and_divides_the_step():
    positions = torch.arange(20)[None]
    models = [build_model(tiny("dense", grape={"grapem_log_freq_scale": scale})) for scale in (1.0, 16.0)]
    one, sixteen = (model.rotary_pos_emb(positions) for model in models)
    torch.testing.assert_close(one, sixteen, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for model in models:
            model.rotary_pos_emb.log_freq += 0.1
    changed = [(model.rotary_pos_emb.log_freq / model.rotary_pos_emb.scale).exp() for model in models]
    torch.testing.assert_close(changed[0] / changed[1], torch.full((4,), math.exp(0.1 - 0.1 / 16)))


def test_frequencies_of_each_head_when_keys_are_not_shared():
    arch = tiny("dense", model={"num_query_groups": 4}, grape={"grapem_share_across_heads": False})
    model = randomize(build_model(arch))
    assert model.rotary_pos_emb.log_freq.shape == (4, 4)
    shared = build_model(tiny("dense", model={"num_query_groups": 4}))
    shared.load_state_dict(model.state_dict() | {"rotary_pos_emb.log_freq": model.rotary_pos_emb.log_freq[0]})
    batch = rows([[12]])
    torch.testing.assert_close(model(*batch), shared(*batch))
    with torch.no_grad():
        model.rotary_pos_emb.log_freq[2] += 3.0
    assert (model(*batch) - shared(*batch)).abs().max() > 1e-3


def test_global_layers_are_not_rotated_and_local_layers_have_no_slopes():
    layers = build_model(tiny("dense")).decoder.layers
    assert [layer.self_attention.rotates for layer in layers] == [True, True, True, False]
    assert [layer.self_attention.core_attention.slopes is None for layer in layers] == [True] * 3 + [False]
    assert all(layer.self_attention.rotates for layer in build_model(tiny("compat")).decoder.layers)


def test_slopes_have_their_golden_values():
    assert alibi_slopes(8) == [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    # 6 heads: the 4 slopes of 4 heads, then every second slope of 8 heads
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert alibi_slopes(1) == [2.0**-8]


def test_slopes_and_frequencies_stay_fp32_in_bf16():
    model = build_model(tiny("dense"), dtype=torch.bfloat16)
    assert model.rotary_pos_emb.log_freq.dtype == torch.float32
    assert model.decoder.layers[3].self_attention.core_attention.slopes.dtype == torch.float32
    before = model.rotary_pos_emb.log_freq.clone()
    model.float().bfloat16()
    assert torch.equal(model.rotary_pos_emb.log_freq, before)
    initialize(model, model.config, 1234, tp_rank=0, tp_size=1)
    assert torch.equal(model.rotary_pos_emb.log_freq, before)
