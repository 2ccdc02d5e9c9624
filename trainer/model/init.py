"""Initial weights, made by name: the same model whatever the layout, device or order of construction."""

import hashlib
import math
import re

import torch
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.positions import initial_log_freq
from trainer.model.value_residual import initial_logit

INIT_STD = 0.02

_ZEROS = re.compile(r"(^|\.)(bias|bias1|bias2)$")
_ONES = re.compile(r"(input_layernorm|pre_mlp_layernorm|final_layernorm|q_layernorm|k_layernorm)\.weight$")
_DOWN = re.compile(r"(linear_proj\.weight|linear_fc2\.weight|experts\.weight2)$")
_NORMAL = re.compile(
    r"(linear_qkv\.weight|linear_tpa\.[ab]_[qkv]|linear_fc1\.weight|experts\.weight1|router\.weight|softmax_offset"
    r"|word_embeddings\.weight|output_layer\.weight)$"
)


@torch.no_grad()
def initialize(
    model: nn.Module, config: VPTransformerConfig, seed: int, *, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of this rank.

    Linear weights, embedding, head and sinks are N(0, 0.02²); output projections and FFN down projections
    N(0, (0.02 / √(2L))²); biases 0, gains 1; ω and `log_freq` by their formulas. A random tensor is drawn
    whole, in fp32 on the CPU, from a generator seeded by (seed, name) or, for experts, (seed, name, global
    expert number), and then cut to this rank's share. Two layouts, or a CPU and a GPU, therefore start from
    the same bits.

    Args:
        model: Built, unfilled.
        config: Its config.
        seed: Of the experiment.
        tp_rank: This rank in the tensor-parallel group.
        tp_size: Size of that group.

    Raises:
        ValueError: A parameter's name matches no rule.
    """
    down_std = INIT_STD / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("value_residual_logit"):
            parameter.fill_(initial_logit(config.value_residual_init, config.value_residual_eps))
        elif name.endswith("log_freq"):
            parameter.copy_(initial_log_freq(config.kv_channels, config.rotation_base, config.log_freq_scale))
        elif _ONES.search(name):
            parameter.fill_(1.0)
        elif _ZEROS.search(name):
            parameter.zero_()
        elif _DOWN.search(name):
            _fill_normal(parameter, name, down_std, seed, model, tp_rank, tp_size)
        elif _NORMAL.search(name):
            _fill_normal(parameter, name, INIT_STD, seed, model, tp_rank, tp_size)
        else:
            raise ValueError(
                f"parameter {name} {list(parameter.shape)} has no initialisation rule in trainer.model.init"
            )


def named_generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator of its own for a name, independent of all others and of the order of asking."""
    text = ":".join(str(part) for part in (seed, *names))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _fill_normal(
    parameter: nn.Parameter, name: str, std: float, seed: int, model: nn.Module, tp_rank: int, tp_size: int
) -> None:
    if getattr(parameter, "expert_parallel", False):
        first: int = model.get_submodule(name.rpartition(".")[0]).first_expert  # type: ignore[assignment]
        for local, matrix in enumerate(parameter):
            generator = named_generator(seed, name, first + local)
            matrix.copy_(
                torch.empty(matrix.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            )
        return
    shape = list(parameter.shape)
    axis: int = (
        getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    )
    if axis >= 0:
        shape[axis] *= tp_size
    whole = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=named_generator(seed, name))
    if axis >= 0:
        whole = whole.narrow(axis, tp_rank * parameter.shape[axis], parameter.shape[axis])
    parameter.copy_(whole)
