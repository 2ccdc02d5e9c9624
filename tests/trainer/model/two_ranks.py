"""All that is checked of the model on two ranks, in one pair of processes."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.trainer.model.model_cases import VOCAB, rows, tiny
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError
from trainer.decoding.cache import DecodingCache, next_logits
from trainer.model.gpt import VPGPTModel, build_model

PER_HEAD = {"model": {"num_query_groups": 4}, "grape": {"grapem_share_across_heads": False}}
CASES: dict[str, dict[str, Any]] = {
    "compat, tp 2": {"arch": tiny("compat"), "tp": 2},
    "dense, tp 2": {"arch": tiny("dense"), "tp": 2},
    "dense with a rotation per head, tp 2": {"arch": tiny("dense", **PER_HEAD), "tp": 2},
    "moe, tp 2": {"arch": tiny("moe"), "tp": 2},
    "moe, tp 2, ep 2": {"arch": tiny("moe"), "tp": 2, "ep": 2},
    "moe, ep 2": {"arch": tiny("moe"), "ep": 2},
    "moe, dp 2": {"arch": tiny("moe")},
    "dense, dp 2": {"arch": tiny("dense")},
}
DOCUMENTS = [[6, 4], [9]]
"""Two rows of 11 tokens, one and two of them padding."""


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows(DOCUMENTS, width=11)


def odd_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """11 tokens: two tensor-parallel ranks cannot share them evenly."""
    return rows([[5, 6]], seed=1)


def loss_weights() -> torch.Tensor:
    return torch.randn(2, 11, VOCAB, generator=torch.Generator().manual_seed(3))


def reference_weights(arch: Architecture) -> dict[str, torch.Tensor]:
    """The weights that both the single process and the two ranks run with: whole tensors."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in sorted(whole_shapes(arch).items()):
        weights[name] = torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.3)
        if name.endswith("layernorm.weight"):
            weights[name] += 1.0
        if name.endswith("log_freq"):
            weights[name] -= torch.arange(shape[-1]) * 8.0
    return weights


def whole_shapes(arch: Architecture) -> dict[str, torch.Size]:
    """Shapes of the whole parameters, from this rank's on the meta device."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    shapes = {}
    for name, parameter in build_model(arch, device="meta").named_parameters():
        shape = list(parameter.shape)
        if getattr(parameter, "expert_parallel", False):
            shape[0] *= ep
        elif getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp
        shapes[name] = torch.Size(shape)
    return shapes


def run(
    model: VPGPTModel, inputs: tuple[torch.Tensor, ...], weights: torch.Tensor, share: float
) -> torch.Tensor:
    """Forward and backward of a loss that sums over tokens; returns this rank's logits."""
    logits = model(*inputs)
    mask = (inputs[2] >= 0)[..., None]
    loss = (logits * weights * mask).sum() + share * model.pop_aux_loss()
    loss.backward()
    return logits.detach() * mask


def whole(name: str, tensor: torch.Tensor, parameter: torch.nn.Parameter, tp: int, ep: int) -> torch.Tensor:
    """A tensor shaped like this rank's parameter, put together from all ranks."""
    if getattr(parameter, "expert_parallel", False):
        axis, group, size = 0, parallel_state.get_expert_model_parallel_group(), ep
    else:
        axis, group, size = (
            getattr(parameter, "partition_dim", -1),
            parallel_state.get_tensor_model_parallel_group(),
            tp,
        )
        if not getattr(parameter, "tensor_model_parallel", False):
            axis = -1
    if size == 1 or axis < 0:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=axis)


def reduce_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What the trainer does: a sum over the group that holds the same parameter and saw other samples."""
    gradient = parameter.grad.clone()
    if getattr(parameter, "allreduce", True):
        group = parallel_state.get_data_parallel_group()
    else:
        group = parallel_state.get_expert_data_parallel_group()
    dist.all_reduce(gradient, group=group)
    return gradient


def check(case: dict[str, Any]) -> dict[str, Any]:
    tp, ep = case.get("tp", 1), case.get("ep", 1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    fresh = build_model(case["arch"])
    found: dict[str, Any] = {
        "initial": {name: whole(name, p.detach(), p, tp, ep) for name, p in fresh.named_parameters()}
    }
    model = load(build_model(case["arch"]), case["arch"])
    inputs, weights = batch(), loss_weights()
    if tp == 1:  # each rank has a row of its own
        row = slice(dist.get_rank(), dist.get_rank() + 1)
        inputs, weights = tuple(tensor[row] for tensor in inputs), weights[row]
        axis, size, share = 0, 2, 0.5
    else:
        part = VOCAB // tp
        weights = weights[..., dist.get_rank() * part : (dist.get_rank() + 1) * part]
        axis, size, share = 2, tp, 1.0
    logits = run(model, inputs, weights, share)
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits)
    found["logits"] = torch.cat(parts, dim=axis)
    found["gradients"] = {
        name: whole(name, reduce_gradient(p), p, tp, ep) for name, p in model.named_parameters()
    }
    if tp > 1:
        model.eval()
        logits = model(*odd_batch()).detach()
        parts = [torch.empty_like(logits) for _ in range(tp)]
        dist.all_gather(parts, logits)
        found["odd logits"] = torch.cat(parts, dim=2)
        found["decoded"] = decode(model)
    if model.moe_layers:
        counts = model.router_counts()
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        found["counts"] = counts
    found["sharded"] = {
        value.key: (
            tuple(value.global_shape),
            tuple(value.global_offset),
            tuple(value.local_shape),
            value.replica_id,
        )
        for value in model.sharded_state_dict().values()
        if isinstance(value, ShardedTensor)
    }
    parallel_state.destroy_model_parallel()
    return found


def decode(model: VPGPTModel) -> torch.Tensor:
    """``[2, 4, V]``: logits after a prompt of 5 tokens (2 in the other row) and three single ones, cached."""
    tokens, cache = batch()[0], DecodingCache(2)
    logits = [next_logits(model, cache, tokens[:, :5], [5, 2])]
    for step in range(3):
        logits.append(next_logits(model, cache, torch.stack([tokens[:1, 5 + step], tokens[1:, 2 + step]])))
    return torch.stack(logits, dim=1)


def load(model: VPGPTModel, arch: Architecture) -> VPGPTModel:
    """This rank's slices of the weights that the single process runs with."""
    weights = reference_weights(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = weights[name]
            if getattr(parameter, "expert_parallel", False):
                first = parallel_state.get_expert_model_parallel_rank() * parameter.shape[0]
                full = full.narrow(0, first, parameter.shape[0])
            elif getattr(parameter, "tensor_model_parallel", False):
                axis, size = parameter.partition_dim, parameter.shape[parameter.partition_dim]
                full = full.narrow(axis, parallel_state.get_tensor_model_parallel_rank() * size, size)
            parameter.copy_(full)
    return model


def refusals() -> dict[str, str]:
    """Layouts that are refused, with their messages."""
    found = {}
    for name, groups, kind in (
        ("no groups", None, "dense"),
        ("expert tensor parallel", {"tensor_model_parallel_size": 2}, "moe"),
    ):
        if groups is not None:
            parallel_state.initialize_model_parallel(**groups)
        try:
            build_model(tiny(kind), device="meta")
        except ConfigError as error:
            found[name] = str(error)
        if groups is not None:
            parallel_state.destroy_model_parallel()
    return found


def findings() -> dict[str, Any]:
    """What both ranks found, by case, and the refusals; runs on each of two ranks."""
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"refusals": refusals()}
    for name, case in CASES.items():
        found = check(case)
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, found)
        results[name] = everyone
    dist.barrier()
    dist.destroy_process_group()
    return results
