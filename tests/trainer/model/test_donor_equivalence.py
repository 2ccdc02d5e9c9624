"""The compat rung is the donor's own function: its logits are those of transformers' Qwen3."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.trainer.model.model_cases import VOCAB, randomize, rows, tiny
from trainer.model.gpt import build_model
from trainer.model.qkv import interleave_qkv


@pytest.fixture(scope="module")
def qwen3():
    """ReLU with gate weights equal to up weights: ``relu(Wz) · Wz = relu(Wz)²``, exactly."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=12,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            hidden_act="relu",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=False,
            attention_bias=False,
            attn_implementation="eager",
        )
    ).eval()
    randomize(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.up_proj.weight)
    return model


def as_megatron(donor: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    weights = {
        "embedding.word_embeddings.weight": donor.model.embed_tokens.weight,
        "output_layer.weight": donor.lm_head.weight,
        "decoder.final_layernorm.weight": donor.model.norm.weight,
    }
    for index, layer in enumerate(donor.model.layers):
        attention = layer.self_attn
        heads = [
            matrix.weight.unflatten(0, (-1, 8)).permute(2, 0, 1)
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        ours = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "pre_mlp_layernorm.weight": layer.post_attention_layernorm.weight,
            "self_attention.q_layernorm.weight": attention.q_norm.weight,
            "self_attention.k_layernorm.weight": attention.k_norm.weight,
            "self_attention.linear_qkv.weight": interleave_qkv(*heads).t(),
            "self_attention.linear_proj.weight": attention.o_proj.weight,
            "mlp.linear_fc1.weight": layer.mlp.up_proj.weight,
            "mlp.linear_fc2.weight": layer.mlp.down_proj.weight,
        }
        weights |= {f"decoder.layers.{index}.{name}": tensor for name, tensor in ours.items()}
    return weights


@pytest.mark.parametrize("biases", [True, False])
def test_logits_equal_transformers_qwen3(qwen3, biases):
    arch = tiny("compat", model={"add_bias_linear": biases, "add_qkv_bias": biases})
    model = build_model(arch).eval()
    model.load_state_dict(model.state_dict() | as_megatron(qwen3))  # biases stay at their zeros
    tokens, positions, documents = rows([[20], [20]])
    expected = qwen3(input_ids=tokens).logits
    assert expected.abs().max() > 1.0
    torch.testing.assert_close(model(tokens, positions, documents), expected, rtol=1e-5, atol=2e-5)


def test_gradients_equal_transformers_qwen3(qwen3):
    model = build_model(tiny("compat"))
    weights = as_megatron(qwen3)
    model.load_state_dict(model.state_dict() | weights)
    tokens, positions, documents = rows([[16]])
    for run in (lambda: model(tokens, positions, documents), lambda: qwen3(input_ids=tokens).logits):
        run().logsumexp(-1).sum().backward()
    first, donor = model.decoder.layers[0], qwen3.model.layers[0]
    torch.testing.assert_close(
        first.self_attention.linear_proj.weight.grad, donor.self_attn.o_proj.weight.grad, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        first.mlp.linear_fc1.weight.grad,
        donor.mlp.up_proj.weight.grad + donor.mlp.gate_proj.weight.grad,
        rtol=1e-3,
        atol=1e-4,
    )
    qwen3.zero_grad()
