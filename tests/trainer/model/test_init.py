import hashlib
import math

import pytest
import torch

from tests.trainer.model.model_cases import tiny
from trainer.model.gpt import build_model
from trainer.model.init import initialize, named_generator, require_filled
from trainer.model.precision import Float32Parameters


def wide():
    return tiny(
        "moe",
        model={
            "hidden_size": 128,
            "head_dim": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "dense_ffn_hidden_size": 128,
        },
    )


def test_every_weight_has_its_spread():
    model = build_model(wide())
    down = 0.02 / math.sqrt(8)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if "layernorm" in name:
            assert (parameter == 1).all(), name
        elif leaf in ("bias", "bias1", "bias2"):
            assert not parameter.any(), name
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight", "weight2")):
            assert parameter.std().item() == pytest.approx(down, rel=0.1), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / parameter.numel() ** 0.5, name
    sinks = torch.cat([layer.self_attention.core_attention.softmax_offset for layer in model.decoder.layers])
    assert sinks.std().item() == pytest.approx(0.02, rel=0.5)
    assert not model.moe_layers[0].router.bias.any()


def test_no_two_weights_start_alike():
    model = build_model(wide())
    experts = model.moe_layers[0].experts.weight1.flatten(1)
    assert (torch.corrcoef(experts) - torch.eye(8)).abs().max() < 0.1
    again = model.moe_layers[1].experts.weight1.flatten(1)
    assert torch.corrcoef(torch.stack([experts[0], again[0]]))[0, 1].abs() < 0.1
    assert not torch.equal(model.output_layer.weight, model.embedding.word_embeddings.weight)


def test_the_seed_decides_the_weights():
    one, same, other = (build_model(tiny("moe"), seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim >= 2 and "bias" not in name:
            assert not torch.equal(a, c), name


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build_model(tiny("dense"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(build_model(tiny("dense")).output_layer.weight, first.output_layer.weight)


def test_bf16_weights_are_the_rounded_fp32_weights():
    exact, rounded = build_model(tiny("moe")), build_model(tiny("moe"), dtype=torch.bfloat16)
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b), name


def test_names_give_independent_generators():
    draws = [torch.randn(4, generator=named_generator(1, *names)) for names in (("a",), ("b",), ("a", 0))]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], torch.randn(4, generator=named_generator(1, "a")))


GOLDEN = {
    ("dense", torch.float32): "3ab2f9a2f64eae8e0fe3e44353aaa85a5bbf4fa3d45894f674ae2c5bdedf2eaf",
    ("dense", torch.bfloat16): "b753b7084871d51dac54e601540dcdf1ea4504a301744a00334b6c3d54d64173",
    ("moe", torch.float32): "1ea479386eafedef2d5cb1d38dc9a1508c289c4885cba72cdf654aaaf7f03a60",
    ("moe", torch.bfloat16): "bc015d7b3412e5c9379fa1b10ee321811f76b08a8acc88f7f8d41977a923f4dc",
    ("compat", torch.float32): "2b7e8e23935b9e81a1ba4547a91138a45cbbdeff57fbb7eab4adc90555ee723c",
    ("compat", torch.bfloat16): "cb0e269be7ecd617b509e2b3b68807372dd5f939bced99870cad62d534ce05fa",
}
"""sha256 over names and bytes of the weights of seed 7, as commit 682cd9e drew them one after the other."""


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(("kind", "dtype"), GOLDEN)
def test_a_seed_gives_the_bits_it_always_gave_however_many_threads_draw(kind, dtype, threads, monkeypatch):
    monkeypatch.setattr("trainer.model.init.DRAW_ELEMENTS", 500)
    digest, before = hashlib.sha256(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build_model(tiny(kind), dtype=dtype, seed=7)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[kind, dtype]


def test_weights_to_be_loaded_are_not_drawn(monkeypatch):
    def drawing(*_):
        raise AssertionError("a number was drawn")

    monkeypatch.setattr("trainer.model.init._draws", drawing)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(tiny("moe"), seed=None, dtype=dtype)
        weights = {name: value for name, value in model.state_dict().items() if value is not None}
        assert "decoder.layers.1.mlp.router.expert_bias" in weights
        assert all(value.isnan().all() for value in weights.values())
        assert not model.moe_layers[0].router.tokens_per_expert.any(), "what no checkpoint holds is ready"
    with pytest.raises(ValueError, match=f"somewhere: {len(weights)} tensors of the model hold NaN"):
        require_filled(model, "somewhere")


def test_a_single_number_that_was_not_loaded_is_found():
    drawn, model = build_model(tiny("moe")), build_model(tiny("moe"), seed=None)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value is not None:
                value.copy_(drawn.state_dict()[name])
    require_filled(model, "a test")
    for name in ("decoder.layers.1.mlp.experts.weight2", "decoder.layers.1.mlp.router.expert_bias"):
        tensor = model.state_dict()[name]
        kept = tensor.clone()
        tensor.view(-1)[-1] = float("nan")
        with pytest.raises(
            ValueError, match=f"a test: 1 tensors of the model hold NaN after loading, {name}"
        ):
            require_filled(model, "a test")
        tensor.copy_(kept)


def test_a_draw_that_fails_is_not_swallowed(monkeypatch):
    monkeypatch.setattr("trainer.model.init.named_generator", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_model(tiny("dense"))


def test_a_parameter_without_a_rule_is_refused():
    model = build_model(tiny("dense"))
    model.decoder.surprise = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"decoder\.surprise \[3\] has no initialisation rule"):
        initialize(model, model.config, 0, tp_rank=0, tp_size=1)


def test_the_meta_device_holds_shapes_and_no_weights():
    model = build_model(tiny("moe"), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert model.output_layer.weight.dtype == torch.bfloat16
    assert model.rotary_pos_emb.log_freq.dtype == torch.float32


def test_parameters_say_what_they_are():
    model = build_model(tiny("moe"), device="meta")
    by_name = dict(model.named_parameters())
    assert by_name["embedding.word_embeddings.weight"].is_embedding_or_output_parameter
    assert by_name["output_layer.weight"].is_embedding_or_output_parameter
    experts = "decoder.layers.1.mlp.experts."
    assert by_name[experts + "weight1"].matrix_batch
    assert by_name[experts + "bias1"].vector_batch
    assert by_name[experts + "weight2"].allreduce  # one rank: nothing is separate
    assert by_name["rotary_pos_emb.log_freq"].adamw_only
    kept = {name for name, parameter in by_name.items() if getattr(parameter, "keep_fp32", False)}
    logits = {f"decoder.layers.{i}.self_attention.value_residual_logit" for i in (1, 2, 3)}
    assert kept == {"rotary_pos_emb.log_freq", *logits}


def test_a_cast_leaves_gradients_of_protected_parameters_alone():
    class Module(Float32Parameters):
        float32_names = ("kept", "absent")

        def __init__(self):
            super().__init__()
            self.kept, self.cast = (torch.nn.Parameter(torch.tensor([4.59512])) for _ in range(2))

    module = Module()
    (module.kept * module.cast).backward()
    gradient = module.kept.grad.clone()
    module.bfloat16()
    assert module.kept.dtype == module.kept.grad.dtype == torch.float32
    assert torch.equal(module.kept.grad, gradient)
    assert module.cast.dtype == module.cast.grad.dtype == torch.bfloat16
