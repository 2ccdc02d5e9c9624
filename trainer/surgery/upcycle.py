"""Dense to mixture of experts: each FFN becomes a shared expert, and its slices the seeds of routed ones."""

import math
from pathlib import Path

import torch

from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.parameters import layer_and_part
from trainer.contract.schema.architecture import MoeConfig
from trainer.contract.schema.rungs.upcycle import UpcycleRecipe
from trainer.surgery.step import Conversion, Outcome, Verdict
from trainer.surgery.tensors import LAYER
from trainer.surgery.vpdense import keep_largest
from trainer.surgery.weights import WeightsReader, WeightsWriter

ROUTER_STD = 1e-3
"""Standard deviation of the router's weights: scores near 0.5 everywhere, ties broken by the noise."""

ENTROPY_SHARE = 0.9
"""Load entropy over its maximum ln E that a fresh router should reach on the fixed batch (5.0 of ln 256)."""

_FFN = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")


def routed_scale(moe: MoeConfig, gain: float, slices: int) -> float:
    """Factor on the routed experts' output projections so that they carry `gain` of the dense function.

    A fresh router is near uniform: a token's K experts share a total weight w (the scaling factor, or half
    of it for a single sigmoid), and each holds one of `slices` equal parts of the neurons, at random. Their
    sum is w / slices of the dense FFN in expectation, so `gain` of it takes the factor gain · slices / w.

    Args:
        moe: The experts.
        gain: Share of the dense function.
        slices: Parts that the dense FFN is cut into.
    """
    alone = moe.topk == 1 and moe.router_score_function == "sigmoid"
    weight = moe.router_topk_scaling_factor * (0.5 if alone else 1.0)
    return gain * slices / weight


def convert(conversion: Conversion, out: WeightsWriter) -> Outcome:
    """Copy everything but the FFNs of MoE layers, and make those into experts.

    The shared expert is the dense FFN. Routed expert e takes slice `e mod n` of its neurons plus noise of
    relative size `expert_noise`, its output projection scaled by `routed_scale`. At
    `routed_gain = 0` that projection is zero: the function is the parent's bit for bit, and the projection
    has a gradient at once. At gain g the shared output projection is scaled by 1 − g.

    Args:
        conversion: With an `UpcycleRecipe`.
        out: The MoE checkpoint.
    """
    recipe = _recipe(conversion)
    moe = recipe.architecture.moe
    assert moe is not None
    width, routed = dense_ffn_hidden_size(recipe.parent), recipe.architecture.model.ffn_hidden_size
    scale = routed_scale(moe, recipe.surgery.routed_gain, width // routed)
    layers = set(moe_layers(recipe.architecture))
    transform = {
        "init_experts": recipe.surgery.init_experts,
        "expert_noise": recipe.surgery.expert_noise,
        "routed_gain": recipe.surgery.routed_gain,
        "routed_output_scale": scale,
        "slices": width // routed,
        "init_router": recipe.surgery.init_router,
        "router_std": ROUTER_STD,
        "layer1": recipe.surgery.layer1,
    }
    with WeightsReader(conversion.source) as source:
        source.require_rung(recipe.parent, recipe.parent_dtype)
        narrow = _narrow_first_layer(recipe, source)
        if narrow is not None:
            transform["layer1_neurons"] = narrow.tolist()
        for name in out.specs:
            number, part = layer_and_part(name)
            if number in layers and part.startswith("mlp."):
                continue  # made from the whole FFN, below
            value = source.read(name)
            if narrow is not None and number == 1:
                value = _take_neurons(part.removeprefix("mlp."), value, narrow)
            out.write(name, value)
        for number in sorted(layers):
            _make_experts(conversion, recipe, scale, number, source, out)
    kinds = layer_kinds(recipe.architecture)
    return Outcome(
        transform=transform,
        layers=[
            {"layer": number, "kind": kind, "ffn": "experts" if number in layers else "dense"}
            for number, kind in enumerate(kinds, start=1)
        ],
    )


def _narrow_first_layer(recipe: UpcycleRecipe, source: WeightsReader) -> torch.Tensor | None:
    """Neurons that a narrower dense first layer keeps; None where it is as wide as the parent's."""
    first, width = dense_ffn_hidden_size(recipe.architecture), dense_ffn_hidden_size(recipe.parent)
    if 1 in moe_layers(recipe.architecture) or first == width:
        return None
    return keep_largest(source.read_fp32(LAYER.format(0) + "mlp.linear_fc2.weight"), first)


def _take_neurons(part: str, value: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    if part in ("linear_fc1.weight", "linear_fc1.bias"):
        return value[neurons]
    return value[:, neurons] if part == "linear_fc2.weight" else value


def _make_experts(
    conversion: Conversion,
    recipe: UpcycleRecipe,
    scale: float,
    number: int,
    source: WeightsReader,
    out: WeightsWriter,
) -> None:
    """All tensors of one MoE layer's FFN; memory holds one of the stacked ones at a time, in fp32."""
    moe, gain = recipe.architecture.moe, recipe.surgery.routed_gain
    assert moe is not None
    prefix = LAYER.format(number - 1) + "mlp."
    dense = {name: source.read(prefix + name) for name in _FFN if prefix + name in source}
    for name, value in dense.items():
        if name == "linear_fc2.weight" and gain:
            value = (1.0 - gain) * value.float()
        out.write(f"{prefix}shared_experts.{name}", value)

    biased = recipe.architecture.model.add_bias_linear
    fc1, fc2 = dense["linear_fc1.weight"].float(), dense["linear_fc2.weight"].float()
    bias1 = dense["linear_fc1.bias"].float() if biased else None
    width = recipe.architecture.model.ffn_hidden_size

    def stack(tensor: torch.Tensor, label: str, factor: float = 1.0) -> torch.Tensor:
        """`[E, F, …]`: slice e mod n of `tensor`'s rows plus noise, times a factor."""
        shape = (moe.num_experts, width, *tensor.shape[1:])
        if factor == 0.0:
            return torch.zeros(shape)
        strength = recipe.surgery.expert_noise * tensor.square().mean().sqrt()
        stacked = torch.empty(shape)
        for expert, part in enumerate(stacked):
            generator = conversion.generator("upcycle", number, expert, label)
            part.normal_(generator=generator).mul_(strength)
            start = expert * width % tensor.shape[0]
            part.add_(tensor[start : start + width]).mul_(factor)
        return stacked

    out.write(f"{prefix}experts.weight1", stack(fc1, "weight1"))
    # Neurons are the columns of the output projection.
    out.write(f"{prefix}experts.weight2", stack(fc2.t(), "weight2", scale).transpose(1, 2))
    if bias1 is not None:
        out.write(f"{prefix}experts.bias1", stack(bias1, "bias1"))
        out.write(f"{prefix}experts.bias2", torch.zeros(out.specs[f"{prefix}experts.bias2"].shape))
        out.write(f"{prefix}router.bias", torch.zeros(moe.num_experts))
    router = torch.empty(out.specs[f"{prefix}router.weight"].shape)
    out.write(
        f"{prefix}router.weight",
        router.normal_(0.0, ROUTER_STD, generator=conversion.generator("upcycle", number, "router")),
    )
    if moe.router_enable_expert_bias:
        out.write(f"{prefix}router.expert_bias", torch.zeros(moe.num_experts))


def check(conversion: Conversion, payload: Path, outcome: Outcome) -> None:
    """Compare logits with the parent's on a fixed batch, and look at the fresh routers' load."""
    from trainer.model.moe import MoELayer
    from trainer.surgery.agreement import compare_to_parent

    recipe = _recipe(conversion)
    assert recipe.architecture.moe is not None
    experts = recipe.architecture.moe.num_experts
    loads: dict[int, torch.Tensor] = {}

    def watch(number: int, layer: torch.nn.Module) -> None:
        def count(_module: object, _inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            loads[number] = torch.bincount(output[1].flatten().cpu(), minlength=experts)

        if isinstance(mlp := layer.get_submodule("mlp"), MoELayer):
            mlp.router.register_forward_hook(count)

    agreement, changes = compare_to_parent(conversion, recipe, payload, watch)
    for row, change in zip(outcome.layers, changes, strict=True):
        row |= {"residual_change": change, **_health(loads.get(row["layer"]))}
    if recipe.surgery.routed_gain == 0.0:
        outcome.checks["logits_bit_identical"] = Verdict(
            agreement.equal,
            f"logits over {agreement.tokens} seeded tokens equal the parent's bit for bit (routed_gain = 0)",
            agreement.describe(),
        )
    else:
        outcome.checks["logits_finite"] = Verdict(
            math.isfinite(agreement.max_abs_difference),
            f"logits over {agreement.tokens} seeded tokens are finite; at routed_gain = "
            f"{recipe.surgery.routed_gain} they equal the parent's only in expectation",
            agreement.describe(),
        )
    entropy = [row["router_entropy"] for row in outcome.layers if row["router_entropy"] is not None]
    mean, bound = sum(entropy) / len(entropy), ENTROPY_SHARE * math.log(experts)
    outcome.checks["router_entropy"] = Verdict(
        mean >= bound,
        f"mean entropy of the experts' load over {agreement.tokens} seeded tokens is at least "
        f"{ENTROPY_SHARE} ln {experts} = {bound:.3f}",
        {"mean": mean, "min": min(entropy), "bound": bound, "uniform": math.log(experts)},
    )


def _health(load: torch.Tensor | None) -> dict[str, float | int | None]:
    """Entropy (nats), largest share (percent) and idle experts of one layer's load."""
    if load is None:
        return {"router_entropy": None, "max_load_pct": None, "dead_experts": None}
    share = load.double() / load.sum()
    return {
        "router_entropy": float(-(share * share.clamp(min=1e-12).log()).sum()),
        "max_load_pct": 100.0 * float(share.max()),
        "dead_experts": int((load == 0).sum()),
    }


def _recipe(conversion: Conversion) -> UpcycleRecipe:
    assert isinstance(conversion.recipe, UpcycleRecipe)
    return conversion.recipe
