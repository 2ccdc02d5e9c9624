"""Every parameter of an architecture, from its config alone: name, shape, nature, part of the model.

The list is that of `model.named_parameters()`, in its order; tests hold it to the built model in every
parallel layout. With heads N, groups G, width D, hidden size H: a projection of width `(N + 2G) D` is dense
on global layers and, with TPA, a product of two factors on local ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture

Kind = Literal["matrices", "embeddings", "vectors"]
Component = Literal[
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
]
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: As the built model names it.
        shape: Of the whole tensor, before any split.
        component: Part of the model.
        kind: Group of the optimizer: matrices (or stacks of them), embedding and head, everything else.
        split: Axis that tensor parallelism splits; None for what every rank holds whole.
        expert: Of a routed expert: expert parallelism splits axis 0 and tensor parallelism nothing.
        float32: Stays float32 in a bfloat16 model.
    """

    name: str
    shape: tuple[int, ...]
    component: Component
    kind: Kind
    split: int | None = None
    expert: bool = False
    float32: bool = False

    @property
    def elements(self) -> int:
        """Numbers in the whole tensor."""
        return prod(self.shape)

    def local_shape(self, tp: int = 1, ep: int = 1) -> tuple[int, ...]:
        """Shape on one rank."""
        parts, axis = (ep, 0) if self.expert else (tp, self.split)
        if axis is None:
            return self.shape
        return (*self.shape[:axis], self.shape[axis] // parts, *self.shape[axis + 1 :])


def parameters(arch: Architecture) -> tuple[Parameter, ...]:
    """Return all parameters of an architecture, in the order of the built model."""
    return tuple(_model(arch))


def layer_and_part(name: str) -> tuple[int | None, str]:
    """Return the 1-based number of a parameter's layer (None outside of layers) and the rest of its name."""
    if not name.startswith("decoder.layers."):
        return None, name
    index, _, part = name.removeprefix("decoder.layers.").partition(".")
    return int(index) + 1, part


def _model(arch: Architecture) -> Iterator[Parameter]:
    model = arch.model
    table = (arch.vocab_size, model.hidden_size)
    yield Parameter("embedding.word_embeddings.weight", table, "embedding", "embeddings", split=0)
    kinds, routed = layer_kinds(arch), set(moe_layers(arch))
    for number, kind in enumerate(kinds, start=1):
        prefix = f"decoder.layers.{number - 1}."
        yield _vector(f"{prefix}input_layernorm.weight", model.hidden_size, "norms")
        yield from _attention(arch, f"{prefix}self_attention.", number, local=kind == "local")
        yield _vector(f"{prefix}pre_mlp_layernorm.weight", model.hidden_size, "norms")
        if number in routed:
            yield from _experts(arch, f"{prefix}mlp.")
        else:
            yield from _ffn(arch, f"{prefix}mlp.", dense_ffn_hidden_size(arch), "dense FFN")
    yield _vector("decoder.final_layernorm.weight", model.hidden_size, "norms")
    yield Parameter("output_layer.weight", table, "output head", "embeddings", split=0)
    if arch.attention.position_embedding_type == "grapem":
        name, half = "rotary_pos_emb.log_freq", model.head_dim // 2
        if arch.grape.grapem_share_across_heads:
            yield Parameter(name, (half,), "GRAPE-M", "vectors", float32=True)
        else:
            shape = (model.num_attention_heads, half)
            yield Parameter(name, shape, "GRAPE-M", "vectors", split=0, float32=True)


def _vector(name: str, size: int, component: Component, *, split: int | None = None) -> Parameter:
    return Parameter(name, (size,), component, "vectors", split=split)


def _matrix(
    name: str, rows: int, columns: int, component: Component, *, split: int | None = None
) -> Parameter:
    return Parameter(name, (rows, columns), component, "matrices", split=split)


def _attention(arch: Architecture, prefix: str, number: int, *, local: bool) -> Iterator[Parameter]:
    model, tpa = arch.model, arch.tpa
    hidden, dim = model.hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.num_query_groups
    width, bias = (heads + 2 * groups) * dim, model.add_bias_linear or model.add_qkv_bias
    component: Component = "local attention" if local else "global attention"
    if model.value_residual and number > 1:
        name = f"{prefix}value_residual_logit"
        yield Parameter(name, (), "value residual", "vectors", float32=True)
    if tpa.use_tpa and local:
        name, rank, q_rank = f"{prefix}linear_tpa.", tpa.tpa_rank or 0, tpa.tpa_q_rank or 0
        for letter, rows in (("q", heads * q_rank), ("k", groups * rank), ("v", groups * rank)):
            yield _matrix(f"{name}a_{letter}", rows, hidden, component, split=0)
        for letter, rows in (("q", q_rank * dim), ("k", rank * dim), ("v", rank * dim)):
            yield _matrix(f"{name}b_{letter}", rows, hidden, component)
    else:
        name = f"{prefix}linear_qkv."
        yield _matrix(f"{name}weight", width, hidden, component, split=0)
    if bias:
        yield _vector(f"{name}bias", width, component, split=0)
    if model.qk_layernorm:
        for norm in ("q_layernorm", "k_layernorm"):
            yield _vector(f"{prefix}{norm}.weight", dim, "q/k norms")
    if model.softmax_type == "learnable":
        yield _vector(f"{prefix}core_attention.softmax_offset", heads, "softmax offsets", split=0)
    yield _matrix(f"{prefix}linear_proj.weight", hidden, heads * dim, component, split=1)
    if bias:
        yield _vector(f"{prefix}linear_proj.bias", hidden, component)


def _ffn(arch: Architecture, prefix: str, width: int, component: Component) -> Iterator[Parameter]:
    hidden, bias = arch.model.hidden_size, arch.model.add_bias_linear
    yield _matrix(f"{prefix}linear_fc1.weight", width, hidden, component, split=0)
    if bias:
        yield _vector(f"{prefix}linear_fc1.bias", width, component, split=0)
    yield _matrix(f"{prefix}linear_fc2.weight", hidden, width, component, split=1)
    if bias:
        yield _vector(f"{prefix}linear_fc2.bias", hidden, component)


def _experts(arch: Architecture, prefix: str) -> Iterator[Parameter]:
    model, moe = arch.model, arch.moe
    assert moe is not None
    hidden, inner, count = model.hidden_size, model.ffn_hidden_size, moe.num_experts
    yield _matrix(f"{prefix}router.weight", count, hidden, "routers")
    if model.add_bias_linear:
        yield _vector(f"{prefix}router.bias", count, "routers")
    stacks: list[tuple[str, tuple[int, ...], Kind]] = [
        ("weight1", (inner, hidden), "matrices"),
        ("weight2", (hidden, inner), "matrices"),
    ]
    if model.add_bias_linear:
        stacks += [("bias1", (inner,), "vectors"), ("bias2", (hidden,), "vectors")]
    for name, shape, kind in stacks:
        yield Parameter(f"{prefix}experts.{name}", (count, *shape), "routed experts", kind, expert=True)
    if moe.shared_expert:
        yield from _ffn(arch, f"{prefix}shared_experts.", moe.shared_expert_size or 0, "shared experts")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by component.

    Attributes:
        components: Trainable parameters of each of `COMPONENTS`.
        active_share: K / E as a pair; (1, 1) for a dense model.
        expert_bias_entries: fp32 buffer entries beside the parameters.
    """

    components: dict[Component, int]
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


def count_parameters(arch: Architecture) -> ParameterCount:
    """Count an architecture's parameters by component."""
    components = dict.fromkeys(COMPONENTS, 0)
    for parameter in parameters(arch):
        components[parameter.component] += parameter.elements
    moe = arch.moe
    if moe is None:
        return ParameterCount(components, (1, 1), 0)
    biases = len(moe_layers(arch)) * moe.num_experts if moe.router_enable_expert_bias else 0
    return ParameterCount(components, (moe.topk, moe.num_experts), biases)
