"""Planned activations against the tensors that autograd really saves."""

import pytest
import torch

from tests.trainer.contract.test_parameters import changed
from trainer.contract import activations
from trainer.contract.activations import Pass
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.experiment import load_experiment
from trainer.model import chunked_head, core_attention
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.gpt import build_model


def saved_bytes(arch: Architecture, length: int, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the storages that a training pass keeps, weights left out: of the model, and of the loss."""
    model = build_model(arch, dtype=dtype).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # held, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(address, tensor)
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    torch.manual_seed(0)
    tokens = torch.randint(0, arch.vocab_size, (rows, length))
    positions = torch.arange(length).expand(rows, length).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.forward_hidden(tokens, positions, torch.zeros_like(tokens))
        of_model = total()
        flat = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])
        loss, _ = chunked_cross_entropy(
            flat, model.head_weight, tokens.reshape(-1), torch.ones(tokens.numel())
        )
        loss = loss + model.pop_aux_loss()
    assert loss.requires_grad
    return of_model, total() - of_model


CASES = {
    "moe": ({}, 64, 1),
    "several blocks of queries, two rows": ({}, 600, 2),
    "wide experts": ({"model": {"ffn_hidden_size": 32}}, 128, 1),
    "without shared experts": ({"moe": {"shared_expert": False}}, 128, 1),
    "without TPA": ({"tpa": {"use_tpa": False}}, 128, 1),
    "without value residual": ({"model": {"value_residual": False}}, 128, 1),
    "no auxiliary loss": ({"moe": {"router_load_balancing_type": "none"}}, 128, 1),
    "without biases": ({"model": {"add_bias_linear": False, "add_qkv_bias": False}}, 128, 1),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_is_what_autograd_saves(case, dtype):
    change, length, rows = CASES[case]
    tables = {
        "model": {"num_layers": 4} | change.get("model", {}),
        **{k: v for k, v in change.items() if k != "model"},
    }
    check(changed(load_experiment("smoke").architecture("vpmoe"), **tables), length, rows, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_rope_rung_too(dtype):
    check(
        changed(load_experiment("smoke").architecture("vpdense0_5_28"), model={"num_layers": 3}),
        600,
        1,
        dtype,
    )


def check(arch: Architecture, length: int, rows: int, dtype: str) -> None:
    width, torch_dtype = {"bf16": (2, torch.bfloat16), "fp32": (4, torch.float32)}[dtype]
    plan = Pass(arch, length, rows, width, "cpu")
    of_model, of_loss = saved_bytes(arch, length, rows, torch_dtype)
    assert plan.saved() - of_loss == pytest.approx(of_model, rel=0.005)
    assert of_loss == 4 * (length * rows + arch.vocab_size) * arch.model.hidden_size + 8 * length * rows


def test_the_block_sizes_are_those_of_the_modules():
    assert core_attention._GLOBAL_QUERY_BLOCK == activations.GLOBAL_QUERY_BLOCK
    assert core_attention._LOCAL_QUERY_BLOCK == activations.LOCAL_QUERY_BLOCK
    assert chunked_head.CHUNK_LOGITS == activations.LOSS_LOGITS


def test_activations_grow_with_the_micro_batch_and_shrink_with_tensor_parallelism():
    arch = load_experiment("bench").architecture("vpmoe")
    one, two, split = (Pass(arch, 2048, rows, 2, "cuda", tp).saved() for rows, tp in ((1, 1), (2, 1), (1, 2)))
    assert 1.85 * one < two < 2 * one  # the gradient of the head does not grow
    assert 0.5 * one < split < 0.7 * one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_of_a_step_is_the_planned_one():
    arch = changed(load_experiment("bench").architecture("vpmoe"), model={"num_layers": 8})
    device = torch.device("cuda")
    model = build_model(arch, dtype=torch.bfloat16, device="cuda").train()
    tokens = torch.randint(0, arch.vocab_size, (1, 2048), device=device)
    positions = torch.arange(2048, device=device)[None]
    weights = torch.ones(tokens.numel(), device=device)
    with torch.no_grad():  # cuBLAS takes its work space at the first product and keeps it
        model.forward_hidden(tokens, positions, torch.zeros_like(tokens))
        model.pop_aux_loss()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden = model.forward_hidden(tokens, positions, torch.zeros_like(tokens))
    after_model = torch.cuda.memory_allocated()
    flat = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])
    loss, _ = chunked_cross_entropy(flat, model.head_weight, tokens.reshape(-1), weights)
    loss = loss + model.pop_aux_loss()
    plan = Pass(arch, 2048, 1, 2, "cuda")
    print(
        f"saved by the model {after_model - before}, by all {torch.cuda.memory_allocated() - before}, "
        f"planned {plan.saved()}, peak {torch.cuda.max_memory_allocated() - before}, "
        f"planned {plan.saved() + plan.loss_work()}"
    )
    assert torch.cuda.memory_allocated() - before == pytest.approx(plan.saved(), rel=0.03)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(
        plan.saved() + plan.loss_work(), rel=0.05
    )
