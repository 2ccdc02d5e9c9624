"""One token for every slot by a dozen kernels a layer: what a step is on the backend `fused`.

The model's own forward pass is written for long rows and for gradients, so that a token more for each of a
few dozen sequences costs it two hundred small kernels a layer. Here a layer is its products and a kernel
between two of them (`trainer.decoding.step_kernels`), and an expert's matrices are read only where a token
has chosen it. It computes what `VPGPTModel.forward_hidden` does with a `SlotCache`, but for rounding; tests
hold the one to the other.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from trainer.decoding.slot_cache import SlotCache
from trainer.model.attention import SelfAttention
from trainer.model.experts import StackedExperts
from trainer.model.ffn import DenseFFN
from trainer.model.gpt import VPGPTModel
from trainer.model.moe import MoELayer

MOST_PAIRS = 2048
"""Most (token, choice) pairs of a step: every program of the experts looks at all of them."""
_ROWS = 16
"""Rows of a product that a kernel has at least."""
_KEYS = 64
"""Kept keys that a program attends to at a time."""
_SINKS = {"vanilla": 0, "off-by-one": 1, "learnable": 2}
_COLUMNS_IN, _DEPTH_IN, _COLUMNS_OUT = 64, 128, 128
"""Tiles of the experts' products."""


def obstacle(model: VPGPTModel, slots: int) -> str | None:
    """Say why a model cannot take the steps of this module; None where it can.

    Args:
        model: On its device.
        slots: Tokens of a step.
    """
    config = model.config
    if model.pg_collection.tp.size() > 1:
        return "it is split over ranks (execution.tp)"
    if config.kv_channels < 2 * _ROWS or config.kv_channels & (config.kv_channels - 1):
        return f"model.head_dim = {config.kv_channels} is no power of two from {2 * _ROWS} on"
    if not config.share_rotation_across_heads and config.rotation == "grapem":
        return "grape.grapem_share_across_heads = false"
    if config.num_moe_experts is None:
        return None
    if config.num_moe_experts & (config.num_moe_experts - 1):
        return f"moe.num_experts = {config.num_moe_experts} is no power of two"
    if config.moe_router_num_groups and config.moe_router_num_groups & (config.moe_router_num_groups - 1):
        return f"moe.router_num_groups = {config.moe_router_num_groups} is no power of two"
    if config.moe_router_dtype != "fp32":
        return f"moe.router_dtype = {config.moe_router_dtype!r}"
    if slots * config.moe_router_topk > MOST_PAIRS:
        return f"{slots} slots with moe.topk = {config.moe_router_topk} are more than {MOST_PAIRS} pairs"
    return None


@dataclass(frozen=True)
class _Layer:
    """The parts of a layer, and the matrix that makes queries, keys and values of it in one product."""

    attention: SelfAttention
    mlp: DenseFFN | MoELayer
    attention_gain: Tensor
    mlp_gain: Tensor
    projection: Tensor
    factors: tuple[Tensor, ...]  # of which `projection` is the copy, where it is one


class Step:
    """Runs one token of every slot up to the final norm.

    Args:
        model: With no `obstacle`; its weights are read where they are, but for the factors of tensor
            products, of which `refresh` copies the present values.
        cache: Of the slots.
    """

    def __init__(self, model: VPGPTModel, cache: SlotCache) -> None:
        self._config, self._cache = model.config, cache
        self._embedding: Tensor = model.embedding.word_embeddings.weight
        self._rotation = model.rotary_pos_emb
        self._final_gain: Tensor = model.decoder.final_layernorm.weight
        self._layers = [_layer_of(layer) for layer in model.decoder.layers]
        like, config = self._embedding, model.config
        slots = len(cache.positions)
        self._first_value = like.new_zeros(slots, config.num_query_groups, config.kv_channels)
        self._zero = like.new_zeros(slots, config.hidden_size)

    def refresh(self) -> None:
        """Take the present values of what is copied; weights are moved by training in between."""
        for layer in self._layers:
            if layer.factors:
                torch.cat([factor.detach() for factor in layer.factors], out=layer.projection)

    def __call__(self, tokens: Tensor, running: Tensor) -> Tensor:
        """Run.

        Args:
            tokens: int64 `[B]`.
            running: bool `[B]`; the others meet no expert.

        Returns:
            `[B, H]` after the final norm.
        """
        x = embedding(tokens, self._embedding)
        rotation = None if self._rotation is None else self._rotation(self._cache.positions[:, None])
        delta, bias, pairs = self._zero, None, None
        for layer in self._layers:
            z = self._add_norm(x, delta, bias, pairs, layer.attention_gain)
            attended = self._attend(layer, z, rotation)
            projection = layer.attention.linear_proj
            z = self._add_norm(x, linear(attended, projection.weight), projection.bias, None, layer.mlp_gain)
            pairs = None
            if isinstance(layer.mlp, MoELayer):
                pairs = self._experts(layer.mlp, z, running)
                delta, bias = self._zero, None
                if layer.mlp.shared_experts is not None:
                    delta, bias = _dense(layer.mlp.shared_experts, z)
            else:
                delta, bias = _dense(layer.mlp, z)
        return self._add_norm(x, delta, bias, pairs, self._final_gain)

    def _add_norm(
        self, x: Tensor, delta: Tensor, bias: Tensor | None, pairs: Tensor | None, gain: Tensor
    ) -> Tensor:
        """Add a layer's part to `x`, in place, and return its norm."""
        from trainer.decoding.step_kernels import add_norm

        rows, width = x.shape
        normed = torch.empty_like(x)
        add_norm[(rows,)](
            x,
            delta,
            x if pairs is None else pairs,
            gain if bias is None else bias,
            gain,
            normed,
            width,
            self._config.layernorm_epsilon,
            TOPK=0 if pairs is None else pairs.shape[1],
            BLOCK=_power(width),
            BIASED=bias is not None,
        )
        return normed

    def _attend(self, layer: _Layer, z: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        from trainer.decoding.step_kernels import attend

        part, config = layer.attention, self._config
        product = part.linear_tpa if part.tensor_product else None
        if product is None:
            mixed, bias = linear(z, layer.projection, part.linear_qkv.bias), None
        else:
            mixed, bias = linear(z, layer.projection), product.bias
        core = part.core_attention
        keys, values = self._cache.layers[part.layer_number]
        rows, groups, per_group, dim = len(z), part.groups, core.heads // part.groups, part.head_dim
        out = z.new_empty(rows, core.heads * dim)
        rotates = rotation is not None and part.rotates
        cos, sin = (mixed, mixed) if rotation is None or not part.rotates else rotation
        logit = part.value_residual_logit
        sink = core.softmax_offset
        normed = part.q_layernorm is not None
        attend[(rows, groups)](
            mixed,
            mixed if bias is None else bias,
            part.q_layernorm.weight if part.q_layernorm is not None else mixed,
            part.k_layernorm.weight if part.k_layernorm is not None else mixed,
            cos.contiguous(),
            sin.contiguous(),
            self._first_value,
            mixed if logit is None else logit,
            keys,
            values,
            self._cache.positions,
            mixed if sink is None else sink,
            mixed if core.slopes is None else core.slopes,
            out,
            mixed.shape[1],
            keys.shape[2],
            part.epsilon,
            core.scale,
            GROUPS=groups,
            PER_GROUP=per_group,
            ROWS=max(_ROWS, _power(per_group)),
            D=dim,
            Q_RANK=0 if product is None else product.q_rank,
            KV_RANK=0 if product is None else product.kv_rank,
            BIASED=bias is not None,
            NORMED=normed,
            ROTATED=rotates,
            FIRST=0 if not config.value_residual else 1 if logit is None else 2,
            SINK=_SINKS[config.softmax_type],
            SLOPES=core.slopes is not None,
            BLOCK=_KEYS,
        )
        return out

    def _experts(self, layer: MoELayer, z: Tensor, running: Tensor) -> Tensor:
        """Return what each choice of each token gives, weighted: `[B, K, H]`."""
        from trainer.decoding.step_kernels import experts_in, experts_out, route

        config, router = self._config, layer.router
        experts = cast(StackedExperts, layer.experts)
        (rows, width), topk, count = z.shape, config.moe_router_topk, router.weight.shape[0]
        weights = torch.empty(rows, topk, dtype=torch.float32, device=z.device)
        chosen = torch.empty(rows, topk, dtype=torch.int32, device=z.device)
        logits = _exact_product(z, router.weight)
        route[(rows,)](
            logits,
            logits if router.bias is None else router.bias,
            logits if router.expert_bias is None else router.expert_bias,
            running,
            weights,
            chosen,
            config.moe_router_topk_scaling_factor,
            E=count,
            TOPK=topk,
            NUM_GROUPS=config.moe_router_num_groups or 0,
            GROUP_TOPK=config.moe_router_group_topk or 1,
            SIGMOID=config.moe_router_score_function == "sigmoid",
            BIASED=router.bias is not None,
            STEERED=router.expert_bias is not None,
            num_warps=1,
        )
        inner, pairs = config.moe_ffn_hidden_size, rows * topk
        hidden, out = z.new_empty(pairs, inner), z.new_empty(rows, topk, width)
        biased = experts.bias1 is not None
        depth = min(_DEPTH_IN, _power(width))
        experts_in[(count, -(-inner // _COLUMNS_IN))](
            z,
            experts.weight1,
            experts.bias1 if biased else z,
            weights,
            chosen,
            hidden,
            pairs,
            width,
            inner,
            TOPK=topk,
            PAIRS=max(_ROWS, _power(pairs)),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS_IN,
            BLOCK=max(_ROWS, depth),
            STEPS=-(-width // max(_ROWS, depth)),
            BIASED=biased,
            num_stages=4,
        )
        experts_out[(count + 1, -(-width // _COLUMNS_OUT))](
            hidden,
            experts.weight2,
            experts.bias2 if biased else z,
            weights,
            chosen,
            out,
            pairs,
            width,
            inner,
            PAIRS=max(_ROWS, _power(pairs)),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS_OUT,
            BLOCK=max(_ROWS, _power(inner)),
            BIASED=biased,
        )
        return out


def _layer_of(layer: Any) -> _Layer:
    attention: SelfAttention = layer.self_attention
    factors: tuple[Tensor, ...] = ()
    if attention.tensor_product:
        product = attention.linear_tpa
        factors = (product.a_q, product.a_k, product.a_v, product.b_q, product.b_k, product.b_v)
        projection = torch.cat([factor.detach() for factor in factors])
    else:
        projection = attention.linear_qkv.weight
    gains: tuple[Tensor, Tensor] = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
    return _Layer(attention, layer.mlp, *gains, projection, factors)


def _dense(ffn: DenseFFN, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run an FFN without its last bias; returns that too."""
    from trainer.decoding.step_kernels import squared_relu

    inner = linear(z, ffn.linear_fc1.weight, ffn.linear_fc1.bias)
    block = 1024
    squared_relu[(-(-inner.numel() // block),)](inner, inner.numel(), BLOCK=block)
    return linear(inner, ffn.linear_fc2.weight), ffn.linear_fc2.bias


def _exact_product(z: Tensor, weight: Tensor) -> Tensor:
    """Logits of the router in fp32: products of bf16 are exact there, and so is where they are added up."""
    if z.is_cuda and z.dtype != torch.float32:
        return torch.mm(z, weight.t(), out_dtype=torch.float32)
    return linear(z.float(), weight.float())


def _power(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
