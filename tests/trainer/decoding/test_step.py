"""The kernels of a decoding step, interpreted, against the model's own forward pass."""

import os

import pytest
import torch

from tests.trainer.model.model_cases import VOCAB, randomize, tiny
from trainer.decoding.generation import evaluating
from trainer.decoding.slot_cache import SlotCache
from trainer.decoding.step import Step, obstacle
from trainer.model.gpt import build_model

WIDE = {"num_layers": 3, "head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 1}
CASES = {
    "dense": ("dense", {"model": WIDE}),
    "compat": ("compat", {"model": WIDE | {"softmax_type": "off-by-one", "num_query_groups": 2}}),
    "moe": (
        "moe",
        {
            "model": WIDE | {"num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 128},
            "moe": {"num_experts": 4},
        },
    ),
    "softmax": (
        "moe",
        {
            "model": WIDE | {"add_bias_linear": False, "add_qkv_bias": False},
            "moe": {
                "router_score_function": "softmax",
                "router_enable_expert_bias": False,
                "router_num_groups": None,
                "router_group_topk": None,
                "topk": 3,
                "num_experts": 4,
            },
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only")
def test_steps_are_those_of_the_models_forward_pass(case):
    kind, tables = CASES[case]
    tables = tables | {"attention": {"window_attn_skip_freq": 3}}  # local, local, global
    model = randomize(build_model(tiny(kind, **tables))).eval()
    assert obstacle(model, 3) is None
    generator = torch.Generator().manual_seed(3)
    with evaluating(model):
        for layer in model.moe_layers:
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.normal_(0.0, 0.2, generator=generator)
        plain, fast = SlotCache(model, 3, 12), SlotCache(model, 3, 12)
        step = Step(model, fast)
        for cache in (plain, fast):
            cache.positions.copy_(torch.tensor([0, 2, 9]))
            for keys, values in cache.layers.values():
                for part in (keys, values):
                    part.normal_(generator=torch.Generator().manual_seed(part.shape[2]))
        for moment in range(2):
            tokens = torch.randint(0, VOCAB, (3,), generator=generator)
            running = torch.tensor([True, moment != 1, True])
            doc_id = torch.where(running, 0, -1)[:, None]
            expected = model.forward_hidden(tokens[:, None], plain.positions[:, None], doc_id, plain)[0]
            torch.testing.assert_close(step(tokens, running), expected, rtol=1e-4, atol=1e-5)
            for number, kept in plain.layers.items():
                torch.testing.assert_close(fast.layers[number], kept, rtol=1e-4, atol=1e-5)
            for cache in (plain, fast):
                cache.positions += running
