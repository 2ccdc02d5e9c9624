"""What cannot run is refused at the start, naming the key, the value found and the remedy."""

import re

import pytest
import torch
from megatron.core import parallel_state

from tests.trainer.model.model_cases import rows, tiny
from trainer.contract.schema.base import ConfigError
from trainer.model.config import transformer_config
from trainer.model.gpt import build_model


def test_a_dtype_that_is_not_trained():
    with pytest.raises(ConfigError, match=r"training\.dtype: found torch\.float16; allowed: fp32, bf16"):
        build_model(tiny("dense"), dtype=torch.float16, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test must lack")
def test_a_device_that_is_not_there():
    with pytest.raises(ConfigError, match=r"execution\.device = 'cuda'.*set execution\.device = 'cpu'"):
        build_model(tiny("dense"), device="cuda")


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("dense", {"tp": 4}, r"execution\.tp = 4 does not divide model\.num_query_groups = 2"),
        ("moe", {"ep": 3}, r"execution\.ep = 3 does not divide moe\.num_experts = 8"),
        ("dense", {"ep": 2}, r"execution\.ep = 2: the model has no moe table"),
        ("moe", {"expert_tensor_parallel_size": 2}, r"expert_tensor_parallel_size = 2.*set it to 1"),
        ("moe", {"moe_router_dtype": "bf16"}, r"moe\.router_dtype: found 'bf16'; allowed: fp32, fp64"),
        (
            "moe",
            {"moe_router_score_function": "softmax"},
            r"router_enable_expert_bias = true with .*'softmax'.*sigmoid",
        ),
        ("moe", {"moe_router_score_function": "tanh"}, r"found 'tanh'; allowed: sigmoid, softmax"),
        ("moe", {"moe_router_load_balancing_type": "sinkhorn"}, r"found 'sinkhorn'; allowed: seq_aux_loss"),
        ("moe", {"moe_grouped_gemm": True}, r"moe_grouped_gemm = true"),
        ("dense", {"bias_activation_fusion": True}, r"bias_activation_fusion = true.*set it to false"),
        (
            "dense",
            {"pipeline_model_parallel_size": 2},
            r"pipeline_model_parallel_size = 2 with model\.value_res",
        ),
        ("dense", {"value_residual_init": 1.5}, r"model\.value_residual_init: found 1\.5; allowed: 0 to 1"),
        ("dense", {"value_residual_init": -0.1}, r"model\.value_residual_init: found -0\.1; allowed: 0 to 1"),
        (
            "dense",
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            r"recompute_granularity = 'full' with model\.value_residual = true",
        ),
        ("dense", {"context_parallel_size": 2}, r"context_parallel_size = 2.*set it to 1"),
        ("dense", {"sequence_parallel": True, "tp": 2}, r"sequence_parallel = true.*set it to false"),
        ("dense", {"apply_rope_fusion": True}, r"apply_rope_fusion = true.*GRAPE-M"),
        ("dense", {"rotary_interleaved": True}, r"rotary_interleaved = true"),
        ("dense", {"share_rotation_across_heads": False}, r"grape\.grapem_share_across_heads = false with"),
        ("dense", {"log_freq_scale": 0.0}, r"grape\.grapem_log_freq_scale: found 0\.0"),
        ("dense", {"rotation": "yarn"}, r"position_embedding_type: found 'yarn'; allowed: grapem, rope"),
        ("compat", {"rotation_base": None}, r"grape\.rotary_base: missing"),
        ("dense", {"softmax_type": "sparse"}, r"model\.softmax_type: found 'sparse'; allowed: vanilla"),
        (
            "dense",
            {"attention_softmax_in_fp32": False},
            r"attention\.softmax_in_fp32 = false.*set it to true",
        ),
        ("dense", {"tpa_rank": None}, r"tpa\.use_tpa = true needs .*tpa_rank = None"),
        ("dense", {"window_size": None}, r"tpa\.use_tpa = true needs attention\.window_size"),
        ("dense", {"local_layers": (True,)}, r"local_layers has 1 entries, but model\.num_layers = 4"),
    ],
)
def test_a_layout_or_setting_that_cannot_run(kind, overrides, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(tiny(kind), **overrides)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("compat", {"grape": {"rotary_base": None}}, "needs grape.rotary_base"),
        ("dense", {"attention": {"window_size": 0}}, "tpa.use_tpa = true needs attention.window_size > 0"),
        ("dense", {"tpa": {"tpa_rank": None}}, "needs both tpa_rank and tpa_q_rank"),
        ("dense", {"grape": {"grapem_share_across_heads": False}}, "grape.grapem_share_across_heads = false"),
        ("dense", {"attention": {"window_attn_skip_freq": None}}, "needs attention.window_attn_skip_freq"),
        ("dense", {"model": {"softmax_type": "sparse"}}, "model.softmax_type: found 'sparse'"),
        ("moe", {"moe": {"router_score_function": "softmax"}}, "needs router_score_function = 'sigmoid'"),
        ("moe", {"moe": {"router_dtype": "bf16"}}, "moe.router_dtype: found 'bf16'"),
    ],
)
def test_tables_that_do_not_make_a_model(kind, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny(kind, **changes)


def test_megatrons_key_value_cache_and_packing():
    model = build_model(tiny("dense"))
    attention = model.decoder.layers[0].self_attention
    for argument in ("inference_context", "packed_seq_params"):
        with pytest.raises(NotImplementedError, match=r"inference_context.*DecodingCache"):
            attention(torch.zeros(4, 1, 32), attention_mask=None, **{argument: object()})


def test_router_counts_of_a_dense_model():
    with pytest.raises(ValueError, match="this model is dense"):
        build_model(tiny("dense"), device="meta").router_counts()


def test_expert_tensor_parallelism_in_the_process_groups(monkeypatch):
    build_model(tiny("moe"), device="meta")
    monkeypatch.setattr(parallel_state, "get_expert_tensor_parallel_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size = 2"):
        build_model(tiny("moe"), device="meta")


def test_a_dense_model_has_no_auxiliary_loss():
    model = build_model(tiny("dense"))
    model(*rows([[6]]))
    assert model.pop_aux_loss().item() == 0.0
    assert model.expert_biases() is None
    assert model.moe_layer_numbers == []
