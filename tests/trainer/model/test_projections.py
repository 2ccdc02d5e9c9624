import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection

from tests.trainer.model.model_cases import tiny
from trainer.model.config import transformer_config
from trainer.model.fusing import unfused
from trainer.model.gpt import build_model
from trainer.model.qkv import interleave_qkv, split_qkv
from trainer.model.tpa import TensorProductQKV


def test_rows_of_the_dense_projection_have_megatrons_order():
    """8 heads, 2 groups, D = 128: Q0..Q3, K0, V0, Q4..Q7, K1, V1."""
    rows = torch.arange(1536).view(1, 1, 1536)
    query, key, value = split_qkv(rows, 2, 128)
    assert [query[0, 0, head, 0].item() for head in range(8)] == [0, 128, 256, 384, 768, 896, 1024, 1152]
    assert [key[0, 0, group, 0].item() for group in range(2)] == [512, 1280]
    assert [value[0, 0, group, 0].item() for group in range(2)] == [640, 1408]
    assert value[0, 0, 1, 127].item() == 1535


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 4), per_group=st.integers(1, 4), dim=st.sampled_from([2, 4]))
def test_interleaving_and_splitting_are_inverse(groups, per_group, dim):
    mixed = torch.arange(3 * 2 * groups * (per_group + 2) * dim).view(3, 2, -1)
    query, key, value = split_qkv(mixed, groups, dim)
    assert query.shape == (3, 2, groups * per_group, dim)
    assert torch.equal(interleave_qkv(query, key, value), mixed)


def tensor_product(dtype: torch.dtype = torch.float32) -> TensorProductQKV:
    build_model(tiny("dense"), device="meta")  # makes the process groups
    config = transformer_config(tiny("dense"), dtype=dtype)
    module = TensorProductQKV(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module


def composed(module: TensorProductQKV, z: torch.Tensor) -> np.ndarray:
    """The einsum of the factors in float64, then the interleaved layout and the bias."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}
    x = z.detach().double().numpy()

    def product(kind: str, heads: int, rank: int) -> np.ndarray:
        left = np.einsum("sbi,hri->sbhr", x, weights[f"a_{kind}"].reshape(heads, rank, 32))
        right = np.einsum("sbi,rdi->sbrd", x, weights[f"b_{kind}"].reshape(rank, 8, 32))
        return np.einsum("sbhr,sbrd->sbhd", left, right) / rank

    query, key, value = product("q", 4, 4), product("k", 2, 2), product("v", 2, 2)
    pieces = []
    for group in range(2):
        pieces += [query[:, :, 2 * group], query[:, :, 2 * group + 1], key[:, :, group], value[:, :, group]]
    return np.concatenate(pieces, axis=-1) + weights["bias"]


def test_tensor_product_equals_the_einsum_of_its_factors():
    module = tensor_product()
    z = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(2))
    mixed, bias = module(z)
    assert bias is None
    np.testing.assert_allclose(mixed.detach().numpy(), composed(module, z), rtol=1e-5, atol=1e-4)


def test_one_product_for_all_factors_gives_the_outputs_and_gradients_of_six():
    z = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for fuse in (unfused, lambda function: function):
        module, given = tensor_product(), z.clone().requires_grad_()
        module._fuse = fuse
        mixed, _bias = module(given)
        mixed.square().sum().backward()
        found.append([mixed, given.grad, *(parameter.grad for parameter in module.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_tensor_product_accumulates_in_fp32():
    """In bf16 the factors are rounded, but their composition, division and bias round once, at the end."""
    module = tensor_product(torch.bfloat16)
    z = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    linear = torch.nn.functional.linear
    left = linear(z, module.a_k).double().unflatten(-1, (2, 2))
    right = linear(z, module.b_k).double().unflatten(-1, (2, 8))
    key = left @ right / 2 + module.bias.double().view(2, 4, 8)[:, 2]
    mixed, _ = module(z)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(split_qkv(mixed, 2, 8)[1], key.bfloat16(), rtol=2**-8, atol=0)


def test_only_local_layers_factor_their_projection():
    layers = build_model(tiny("dense"), device="meta").decoder.layers
    assert [hasattr(layer.self_attention, "linear_tpa") for layer in layers] == [True, True, True, False]
    plain = build_model(tiny("dense", tpa={"use_tpa": False}), device="meta").decoder.layers
    assert not any(hasattr(layer.self_attention, "linear_tpa") for layer in plain)


def test_attention_biases_follow_either_switch_and_ffn_biases_one():
    for linear, qkv in ((True, False), (False, True), (False, False)):
        arch = tiny("moe", model={"add_bias_linear": linear, "add_qkv_bias": qkv})
        names = {name for name, _ in build_model(arch, device="meta").named_parameters()}
        attention = {
            "decoder.layers.0.self_attention.linear_tpa.bias",
            "decoder.layers.3.self_attention.linear_qkv.bias",
            "decoder.layers.3.self_attention.linear_proj.bias",
        }
        ffn = {
            "decoder.layers.0.mlp.linear_fc1.bias",
            "decoder.layers.1.mlp.experts.bias2",
            "decoder.layers.1.mlp.router.bias",
            "decoder.layers.1.mlp.shared_experts.linear_fc2.bias",
        }
        assert (attention <= names) == (linear or qkv)
        assert not (attention & names) or (linear or qkv)
        assert (ffn <= names) == linear
        assert not (ffn & names) or linear
