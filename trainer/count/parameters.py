"""How many parameters an architecture has, twice: by formula and by counting a built model."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError

COMPONENTS = (
    "embedding",
    "output head",
    "local attention",
    "global attention",
    "dense FFN",
    "routed experts",
    "shared experts",
    "routers",
    "norms",
    "q/k norms",
    "softmax offsets",
    "value residual",
    "GRAPE-M",
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by component.

    Attributes:
        components: Trainable parameters of each of `COMPONENTS`.
        active_share: K / E as a pair; (1, 1) for a dense model.
        expert_bias_entries: fp32 buffer entries beside the parameters.
    """

    components: dict[str, int]
    active_share: tuple[int, int]
    expert_bias_entries: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.components.values())

    @property
    def non_embedding(self) -> int:
        """All but the input embedding and the output head."""
        return self.total - self.components["embedding"] - self.components["output head"]

    @property
    def active(self) -> int:
        """What one token uses: of the routed experts the share K / E, of the rest (both tables too) all."""
        used, of = self.active_share
        experts = self.components["routed experts"]
        return self.total - experts + experts * used // of

    @property
    def active_non_embedding(self) -> int:
        """`active` without the input embedding and the output head."""
        return self.active - self.components["embedding"] - self.components["output head"]


def count_by_formula(arch: Architecture) -> ParameterCount:
    """Count from the widths alone, without torch.

    With V, H, D, heads N and groups G: a projection of width `(N + 2G) D` is dense (`H · width`) on
    global layers and factored (`H (N R_q + 2 G R + R_q D + 2 R D)`) on local ones with TPA; an FFN of width
    f has `2 H f + f + H` with biases.
    """
    model, tpa, moe = arch.model, arch.tpa, arch.moe
    layers, hidden, dim = model.num_layers, model.hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.num_query_groups
    kinds = layer_kinds(arch)
    local, routed = kinds.count("local"), len(moe_layers(arch))

    width = (heads + 2 * groups) * dim
    attention_bias = model.add_bias_linear or model.add_qkv_bias
    rest = heads * dim * hidden + (width + hidden if attention_bias else 0)
    dense_attention = hidden * width + rest
    local_attention = dense_attention
    if tpa.use_tpa:
        rank, q_rank = tpa.tpa_rank or 0, tpa.tpa_q_rank or 0
        local_attention = hidden * (heads * q_rank + 2 * groups * rank + q_rank * dim + 2 * rank * dim) + rest

    def ffn(inner: int) -> int:
        return 2 * hidden * inner + (inner + hidden if model.add_bias_linear else 0)

    grape_m = 0
    if arch.attention.position_embedding_type == "grapem" and local:
        grape_m = dim // 2 * (1 if arch.grape.grapem_share_across_heads else heads)
    experts = moe.num_experts if moe else 0
    shared = moe.shared_expert_size if moe and moe.shared_expert else None
    components = {
        "embedding": arch.vocab_size * hidden,
        "output head": arch.vocab_size * hidden,
        "local attention": local * local_attention,
        "global attention": (layers - local) * dense_attention,
        "dense FFN": (layers - routed) * ffn(dense_ffn_hidden_size(arch)),
        "routed experts": routed * experts * ffn(model.ffn_hidden_size),
        "shared experts": routed * ffn(shared) if shared else 0,
        "routers": routed * (hidden * experts + (experts if model.add_bias_linear else 0)),
        "norms": (2 * layers + 1) * hidden,
        "q/k norms": 2 * layers * dim if model.qk_layernorm else 0,
        "softmax offsets": layers * heads if model.softmax_type == "learnable" else 0,
        "value residual": layers - 1 if model.value_residual else 0,
        "GRAPE-M": grape_m,
    }
    return ParameterCount(components, *_moe_facts(arch))


_RULES = (
    (r"^embedding\.", "embedding"),
    (r"^output_layer\.", "output head"),
    (r"^rotary_pos_emb\.", "GRAPE-M"),
    (r"value_residual_logit$", "value residual"),
    (r"softmax_offset$", "softmax offsets"),
    (r"\.[qk]_layernorm\.", "q/k norms"),
    (r"(input_layernorm|pre_mlp_layernorm|final_layernorm)\.", "norms"),
    (r"\.router\.", "routers"),
    (r"\.shared_experts\.", "shared experts"),
    (r"\.experts\.", "routed experts"),
    (r"\.mlp\.", "dense FFN"),
    (r"\.self_attention\.", "attention"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def count_built(arch: Architecture, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> ParameterCount:
    """Count the tensors of a built model (of one rank without tensor or expert parallelism), by name.

    Args:
        arch: Its architecture, for what a name does not say: a layer's kind and K / E.
        named_parameters: Of the model, on any device.

    Raises:
        ConfigError: A parameter belongs to no component.
    """
    components = dict.fromkeys(COMPONENTS, 0)
    kinds = layer_kinds(arch)
    for name, parameter in named_parameters:
        component = next((label for pattern, label in _RULES if re.search(pattern, name)), None)
        if component is None:
            raise ConfigError(
                f"parameter {name} {list(parameter.shape)} belongs to no component of the count"
            )
        if component == "attention":
            match = _LAYER.match(name)
            assert match is not None
            component = f"{kinds[int(match.group(1))]} attention"
        components[component] += parameter.numel()
    return ParameterCount(components, *_moe_facts(arch))


def _moe_facts(arch: Architecture) -> tuple[tuple[int, int], int]:
    moe = arch.moe
    if moe is None:
        return (1, 1), 0
    biases = len(moe_layers(arch)) * moe.num_experts if moe.router_enable_expert_bias else 0
    return (moe.topk, moe.num_experts), biases
